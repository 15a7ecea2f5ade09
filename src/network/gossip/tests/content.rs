//! Who holds what becomes known to all, whatever was missed.

use super::*;

#[test]
fn what_one_holds_all_know_soon_and_forget_soon() {
    let mut world = World::settled(40);
    let keys = world.keys();
    for (number, key) in (0..).zip(&keys) {
        world.hold(*key, 1000 + number % 7, true);
    }
    let took = world.until("all know", 2000, |world| {
        (0..7).all(|n| {
            let all = keys.iter().filter(|at| world.holders(**at, 1000 + n).len() >= 40 / 7);
            all.count() == 40
        })
    });
    println!("all know within {took} ms");
    world.hold(keys[3], 1003, false);
    world.until("all forget", 1000, |world| {
        keys.iter().all(|at| !world.holders(*at, 1003).contains(&keys[3])) && world.is_one()
    });
}

/// The tree is one: a change goes to each node about once.
#[test]
fn the_links_form_a_tree() {
    let mut world = World::settled(60);
    let keys = world.keys();
    let change_much = |world: &mut World, base: u64| {
        for n in 0..100 {
            world.hold(keys[(n as usize * 7) % 60], base + n, true);
            world.run(40);
        }
    };
    change_much(&mut world, 10_000);
    let before: Vec<Counts> = world.nodes.values().map(Gossip::counts).collect();
    change_much(&mut world, 20_000);
    let after = world.nodes.values().map(Gossip::counts);
    let (fresh, duplicate) = after.zip(before).fold((0, 0), |(fresh, duplicate), (after, before)| {
        (fresh + after.fresh - before.fresh, duplicate + after.duplicate - before.duplicate)
    });
    println!("{fresh} fresh, {duplicate} duplicate");
    assert!(fresh >= 100 * 59, "{fresh}");
    assert!(duplicate * 10 < fresh, "{duplicate} of {fresh}");
}

#[test]
fn one_that_was_cut_off_catches_up() {
    let mut world = World::settled(12);
    let keys = world.keys();
    let apart = keys[0];
    for key in &keys[1..] {
        world.cut.insert((apart, *key));
    }
    world.until("it is dead to the others", 10_000, |world| world.state(keys[5], apart) == Some(State::Dead));
    for n in 0..500 {
        world.hold(keys[1 + n as usize % 11], 5000 + n, true);
    }
    world.hold(apart, 7777, true);
    world.run(20_000);
    world.cut.clear();
    world.until("all know all", 90_000, |world| {
        world.is_one() && world.holders(apart, 5499).len() == 1 && world.holders(keys[7], 7777) == [apart]
    });
    assert!(keys.iter().all(|key| world.nodes[key].members().live() == 12));
}

/// Its inventory is known from its last life: it tells the difference only.
#[test]
fn one_that_starts_again_tells_the_difference() {
    let mut world = World::settled(8);
    let keys = world.keys();
    for n in 0..1000 {
        world.hold(keys[2], 100_000 + n, true);
    }
    world.until("all know", 3000, |world| world.is_one() && world.holders(keys[5], 100_999) == [keys[2]]);
    world.kill(keys[2]);
    world.run(3000);
    let fresh = world.nodes[&keys[5]].counts().fresh;
    world.restart(keys[2], 200, Limits::default());
    let held: HashSet<u64> = (1..1010).map(|n| 100_000 + n).collect();
    let now = world.now;
    world.nodes.get_mut(&keys[2]).unwrap().hold_all(&held, now);
    world.connect(keys[2], keys[0]);
    world.until("all know the new state", 3000, |world| {
        world.is_one()
            && world.holders(keys[5], 101_009) == [keys[2]]
            && world.holders(keys[5], 100_000).is_empty()
    });
    let told = world.nodes[&keys[5]].counts().fresh - fresh;
    assert!(told < 10, "{told} deltas and records where one has changed in 10 contents");
}

/// The tables are larger than a frame.
#[test]
fn a_newcomer_gets_the_whole_view() {
    let mut world = World::settled(5);
    let keys = world.keys();
    for n in 0..60_000 {
        world.hold(keys[n % 5], n as u64, true);
    }
    world.until("all know", 20_000, |world| world.is_one() && world.holders(keys[1], 59_999).len() == 1);
    let newcomer = world.start(Limits::default());
    world.connect(newcomer, keys[2]);
    let took = world.until("it is complete", 2000, |world| world.nodes[&newcomer].is_complete());
    println!("complete after {took} ms");
    assert!((0..60_000).step_by(997).all(|n| world.holders(newcomer, n as u64) == [keys[n % 5]]));
    world.until("it is one of them", 3000, World::is_one);
}

#[test]
fn a_neighbour_that_goes_while_it_gives_the_whole_view_is_replaced() {
    let mut world = World::settled(4);
    let keys = world.keys();
    for n in 0..60_000 {
        world.hold(keys[n % 4], n as u64, true);
    }
    world.until("all know", 20_000, |world| world.is_one() && world.holders(keys[1], 59_999).len() == 1);
    let newcomer = world.start(Limits::default());
    world.connect(newcomer, keys[2]);
    world.connect(newcomer, keys[3]);
    world.run(4 * STEP);
    assert!(!world.nodes[&newcomer].is_complete());
    world.kill(keys[2]);
    world.until("it is complete", 8000, |world| world.nodes[&newcomer].is_complete());
    assert!((0..60_000).filter(|n| n % 4 != 2).all(|n| world.holders(newcomer, n as u64) == [keys[n % 4]]));
}

/// A version that no owner has told would keep all that it tells later from being believed.
#[test]
fn a_lie_about_another_is_mended_by_who_it_is_about() {
    let mut world = World::settled(10);
    let keys = world.keys();
    let (liar, victim) = (keys[0], keys[1]);
    let now = world.now;
    world.nodes.get_mut(&victim).unwrap().hold_all(&HashSet::from([1]), now);
    world.until("all know", 2000, |world| keys.iter().all(|at| world.holders(*at, 1) == [victim]));
    let now = world.now;
    let node = world.nodes.get_mut(&liar).unwrap();
    let index = node.members.find(victim).unwrap();
    for content in 500..505 {
        let version = node.members.get(index).unwrap().version + 1;
        node.take(index, version, content, true);
        node.push(index, What::Content { epoch: 0, version, content, held: true }, 0, now);
    }
    world.until("it is believed", 2000, |world| world.holders(keys[5], 502) == [victim]);
    world.until("it is mended", 40_000, |world| {
        keys.iter().all(|at| world.holders(*at, 502).is_empty() && world.holders(*at, 1) == [victim])
    });
    world.hold(victim, 2, true);
    world.until("it is believed anew", 2000, |world| keys.iter().all(|at| world.holders(*at, 2) == [victim]));
}
