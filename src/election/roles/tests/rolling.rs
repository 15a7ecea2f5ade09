//! Another policy reaches one node after the other, in any order and at any pace, and what nodes know of each other is late: no key has
//! more than two homes at a time.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const NODES: u32 = 9;
const KEYS: u32 = 12;
/// By the old policies and by the new ones.
const HASHES: [EffectiveHash; 2] = [EffectiveHash([3; 32]), EffectiveHash([4; 32])];

/// Whom a policy prefers: the first third of the nodes, or the last.
fn weights(policy: usize) -> Vec<u32> {
    (0..NODES).map(|node| if policy == 0 { u32::from(node < 3) } else { u32::from(node >= 6) }).collect()
}

/// How many homes keys have at most at any time, and how often nodes ranked by the old ones, by none and by the new ones.
fn roll(changed: &[u32], late: u32) -> (usize, [usize; 3]) {
    let mut benches: Vec<Bench> = (0..NODES).map(Bench::new).collect();
    for bench in &benches {
        bench.ranks.carry(HASHES[0]);
        bench.ranks.say(&weights(0));
    }
    let (mut most, mut ranked) = (0, [0; 3]);
    let mut has = vec![0; benches.len()];
    for second in 0..120 {
        let mut homes = vec![BTreeSet::new(); KEYS as usize];
        for here in 0..NODES {
            let bench = &mut benches[here as usize];
            let now = usize::from(second >= changed[here as usize]);
            if now != has[here as usize] {
                has[here as usize] = now;
                bench.ranks.carry(HASHES[1]);
                bench.ranks.say(&weights(1));
            }
            let members: Vec<Member> = (0..NODES)
                .map(|other| {
                    // Some are told of all others late, and some at once.
                    let delay = if here == other { 0 } else { late * (here % 3) / 2 };
                    let carries = usize::from(second >= changed[other as usize] + delay);
                    let mut member = member(other);
                    member.facts.policy = Mark::of(&HASHES[carries]);
                    member
                })
                .collect();
            let output = bench.at(second, &members);
            for key in 0..KEYS {
                homes[key as usize].insert(format!("{:?}", owner(&output.table, here, key)));
            }
            let by = by(&output, Role::TagHome).0;
            ranked[if by == By::Policy { now * 2 } else { 1 }] += 1;
        }
        most = homes.iter().map(BTreeSet::len).max().unwrap().max(most);
    }
    (most, ranked)
}

fn owner(table: &Table, here: u32, key: u32) -> PeerId {
    match table.home(&key.to_be_bytes()) {
        Home::Here => id(here),
        Home::Peer(peer) => peer,
        Home::Nobody => panic!("a key without a home"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_key_has_two_homes_at_most_while_a_policy_is_rolled_out(
        // Within a moment, or a minute.
        changed in (1_u32..60).prop_flat_map(|pace| prop::collection::vec(15..15 + pace, NODES as usize)),
        // What is told later than a policy has to be carried is no promise's matter.
        late in 0_u32..10,
    ) {
        let (most, ranked) = roll(&changed, late);
        prop_assert!(most <= 2, "{most} homes");
        prop_assert!(ranked.iter().all(|count| *count > 0), "{ranked:?}");
    }
}
