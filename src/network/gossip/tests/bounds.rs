//! What a member can make others keep and do is bounded.

use super::wire::{Delta, Frame, KEYS, Position, contents};
use super::*;

fn deliver(world: &mut World, to: Key, from: Key, frame: Frame) {
    let link = *world.links.iter().find(|(_, ends)| **ends == (to, from) || **ends == (from, to)).unwrap().0;
    let now = world.now;
    world.nodes.get_mut(&to).unwrap().receive(link, frame, now).unwrap();
}

#[test]
fn contents_of_one_member_and_of_all_are_bounded() {
    let mut world = World::new(0);
    let limits = Limits { contents: 1000, pairs: 1500, ..Limits::default() };
    let keys: Vec<Key> = (0..3).map(|_| world.start(limits)).collect();
    world.connect(keys[1], keys[0]);
    world.connect(keys[2], keys[0]);
    world.until("they are one", 5000, |world| world.is_one() && world.nodes[&keys[0]].members().live() == 3);
    for (peer, count) in [(keys[1], 10), (keys[2], 10)] {
        for page in 0..count {
            let keys_of = (0..KEYS as u64).map(|n| mix(peer ^ (page * 100_000 + n)));
            let from = page as u32 * KEYS as u32;
            let delta = Delta { key: peer, epoch: 0, from, contents: contents(keys_of), removed: Vec::new() };
            deliver(&mut world, keys[0], peer, Frame { deltas: vec![delta], ..Frame::default() });
        }
    }
    let node = &world.nodes[&keys[0]];
    assert_eq!(node.members().by_key(keys[1]).unwrap().count, 1000);
    assert_eq!(node.holdings().pairs(), 1500);
    assert!(node.counts().excess > 0);
    assert!(
        node.changes.end() - node.changes.since(node.changes.end()).map_or(0, Iterator::count) as u64 > 0
    );
}

#[test]
fn members_are_bounded() {
    let mut world = World::new(0);
    let limits = Limits { members: 5, ..Limits::default() };
    let first = world.start(limits);
    for _ in 0..10 {
        let key = world.start(Limits::default());
        world.connect(key, first);
        world.run(100);
    }
    assert_eq!(world.nodes[&first].members().known(), 5);
    assert!(world.nodes[&first].counts().excess > 0);
}

#[test]
fn suspicions_of_one_accuser_are_bounded() {
    let mut world = World::settled(40);
    let keys = world.keys();
    let (liar, at) = world.links.values().copied().find(|(a, _)| *a == keys[0]).unwrap();
    let victims: Vec<Key> = keys.iter().copied().filter(|key| *key != liar && *key != at).collect();
    let suspicions = victims.iter().map(|victim| {
        let seq = world.nodes[&at].members().by_key(*victim).unwrap().record.seq;
        world.nodes[&liar].notary.accuse(*victim, seq).signed.clone()
    });
    let frame = Frame { suspicions: suspicions.collect(), ..Frame::default() };
    deliver(&mut world, at, liar, frame);
    let suspected =
        victims.iter().filter(|victim| world.state(at, **victim) == Some(State::Suspected)).count();
    assert_eq!(suspected, LINKS);
}

#[test]
fn links_are_bounded_and_who_comes_later_may_ask() {
    let mut world = World::new(0);
    world.bootstraps = false;
    let first = world.start(Limits::default());
    for _ in 0..LINKS + 4 {
        let key = world.start(Limits::default());
        world.next += 1;
        let link = world.next as LinkId;
        world.links.insert(link, (key, first));
        let now = world.now;
        world.nodes.get_mut(&first).unwrap().link_up(link, key, false, String::new(), now);
    }
    let node = &world.nodes[&first];
    assert_eq!(node.links.len(), LINKS);
    assert_eq!(node.links.iter().filter(|link| !link.guest).count(), NEIGHBOURS_LIMIT);
}

#[test]
fn claims_that_lead_nowhere_are_bounded() {
    let mut world = World::settled(3);
    let keys = world.keys();
    let have: Vec<Position> =
        (0..20_000).map(|n| Position { key: mix(n), seq: 9, ..Position::default() }).collect();
    deliver(&mut world, keys[0], keys[1], Frame { have: have.clone(), ..Frame::default() });
    assert_eq!(world.nodes[&keys[0]].missing.len(), MISSING);
    deliver(&mut world, keys[0], keys[1], Frame { want: have, ..Frame::default() });
    world.run(5000);
    assert!(world.is_one());
}

#[test]
fn a_record_that_is_not_admitted_is_not_believed_from_anybody() {
    let mut world = World::settled(6);
    let stranger = world.start(Limits::default());
    world.barred.lock().unwrap().insert(stranger);
    let keys: Vec<Key> = world.keys().into_iter().filter(|key| *key != stranger).collect();
    let record = world.nodes[&stranger].members().own().record.signed.clone();
    deliver(&mut world, keys[0], keys[1], Frame { records: vec![record], ..Frame::default() });
    assert_eq!(world.state(keys[0], stranger), None);
    assert_eq!(world.nodes[&keys[0]].counts().refused, 1);
}

#[test]
fn who_does_not_say_who_it_is_first_says_nothing() {
    let mut world = World::new(2);
    let (link, (_, to)) = world.links.iter().next().map(|(link, ends)| (*link, *ends)).unwrap();
    let now = world.now;
    let node = world.nodes.get_mut(&to).unwrap();
    assert!(matches!(node.receive(link, Frame { tree: 1, ..Frame::default() }, now), Err(Fault::Hello)));
    let other = mix(4711);
    let record = Mark { key: other, barred: Arc::default() }.seal(draft(other, 1));
    let hello = wire::Hello { record: record.signed.clone(), ..wire::Hello::default() };
    let frame = Frame { hello: Some(hello), ..Frame::default() };
    assert!(matches!(node.receive(link, frame, now), Err(Fault::Stranger)));
}

#[test]
fn a_forged_signature_is_refused() {
    let mut world = World::settled(3);
    let keys = world.keys();
    let record = draft(keys[2], 9_999_999);
    let body = record.body();
    let forged = record.sealed(body, mark(keys[1]));
    deliver(&mut world, keys[0], keys[1], Frame { records: vec![forged.signed], ..Frame::default() });
    assert_eq!(world.nodes[&keys[0]].members().by_key(keys[2]).unwrap().record.seq, 100);
    let forged = Suspicion::sealed(keys[2], 100, keys[1], mark(keys[0]));
    deliver(&mut world, keys[0], keys[1], Frame { suspicions: vec![forged.signed], ..Frame::default() });
    assert_eq!(world.state(keys[0], keys[2]), Some(State::Alive));
}

proptest::proptest! {
    #[test]
    fn frames_never_panic(bytes: Vec<u8>) {
        let _ = wire::decode(bytes.into());
    }
}

/// Each change of it comes as something that is missed, and its record is refused each time.
#[test]
fn one_that_this_node_does_not_believe_is_not_asked_for_all_the_time() {
    let mut world = World::settled(2);
    let first = world.keys()[0];
    // Those that start from now on do not believe each other.
    world.barred = Arc::default();
    let (wary, barred) = (world.start(Limits::default()), world.start(Limits::default()));
    world.barred.lock().unwrap().insert(barred);
    world.cut.insert((wary, barred));
    world.connect(wary, first);
    world.connect(barred, first);
    world.hold(barred, 7, true);
    world.until("the first one knows it", 5000, |world| world.holders(first, 7) == [barred]);
    let before = world.nodes[&wary].counts().grafts;
    for content in 0..20 {
        world.hold(barred, content, true);
        world.run(1000);
    }
    let grafts = world.nodes[&wary].counts().grafts - before;
    assert!(world.state(wary, barred).is_none() && grafts <= 3, "{grafts}");
}
