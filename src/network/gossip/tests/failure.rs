//! Who dies is known to be dead, who lives is not, and who comes back is back.

use super::*;

#[test]
fn one_that_vanishes_is_known_to_be_dead_in_seconds() {
    let mut world = World::settled(30);
    let keys = world.keys();
    world.vanish(keys[4]);
    world.hold(keys[1], 1, true);
    let dead = |world: &World| world.keys().iter().all(|at| world.state(*at, keys[4]) == Some(State::Dead));
    let took = world.until("all know", 4000, dead);
    println!("known to all after {took} ms");
    world.kill(keys[5]);
    let dead = |world: &World| world.keys().iter().all(|at| world.state(*at, keys[5]) == Some(State::Dead));
    let took = world.until("all know", 2000, dead);
    println!("a closed connection is known to all after {took} ms");
    assert!(world.nodes.values().all(|node| node.members().live() == 28));
}

/// One of two, and the other, from which nothing comes any more.
fn left_alone() -> (Gossip<Index>, Key, Ms) {
    let mut world = World::settled(2);
    let keys = world.keys();
    world.hold(keys[0], 1, true);
    world.run(500);
    (world.vanish(keys[0]), keys[1], world.now)
}

/// Looks at the time, and sends what there is to say to nobody.
fn turn(node: &mut Gossip<Index>, now: Ms) {
    node.tick(now);
    for link in node.links().collect::<Vec<_>>() {
        node.flush(link, now);
    }
}

/// Nothing else makes the one that is left look at the time.
#[test]
fn the_only_other_one_is_missed_by_who_looks_only_when_it_has_to() {
    let (mut node, other, start) = left_alone();
    let mut now = start;
    while node.members().by_key(other).unwrap().state != State::Dead {
        now = node.next_due(now).max(now + 1);
        turn(&mut node, now);
        assert!(now < start + 3300, "it is not missed");
    }
    println!("missed after {} ms", now - start);
}

/// It has asked its neighbour for a sign of life, and then stands still for a minute: the answer may wait to be read.
#[test]
fn time_in_which_a_node_stood_still_is_not_held_against_others() {
    let (mut node, other, mut now) = left_alone();
    while node.links[0].asked.is_none() {
        now = node.next_due(now).max(now + 1);
        turn(&mut node, now);
    }
    node.actions();
    now += 60_000;
    turn(&mut node, now);
    assert_eq!(node.actions(), []);
    assert_eq!(node.members().by_key(other).unwrap().state, State::Alive);
    // And then the answer does not come.
    now += GRACE;
    turn(&mut node, now);
    assert!(matches!(node.actions()[..], [Action::Dead(_), ..]));
}

#[test]
fn one_that_leaves_is_gone_at_once_and_not_suspected() {
    let mut world = World::settled(20);
    let keys = world.keys();
    let now = world.now;
    world.nodes.get_mut(&keys[3]).unwrap().leave(now);
    world.run(50);
    world.kill(keys[3]);
    let left = |world: &World| world.keys().iter().all(|at| world.state(*at, keys[3]) == Some(State::Left));
    world.until("all know", 1000, left);
}

#[test]
fn one_that_stood_still_says_that_it_lives() {
    let mut world = World::settled(10);
    let keys = world.keys();
    world.hold(keys[1], 1, true);
    world.frozen.insert(keys[2]);
    world.until("it is dead", 6000, |world| world.state(keys[7], keys[2]) == Some(State::Dead));
    let accusations = |world: &World| {
        let suspected =
            |key: &&Key| world.nodes[&keys[7]].members().by_key(**key).unwrap().suspicion.is_some();
        keys.iter().filter(|key| **key != keys[2]).filter(suspected).count()
    };
    world.frozen.clear();
    let took = world.until("it is back", 15_000, |world| {
        assert_eq!(accusations(world), 0, "it takes its own stillness for that of others");
        world.keys().iter().all(|at| world.state(*at, keys[2]) == Some(State::Alive)) && world.is_one()
    });
    println!("back after {took} ms");
}

#[test]
fn a_suspicion_that_is_wrong_is_refuted() {
    let mut world = World::settled(20);
    let keys = world.keys();
    let (liar, victim) = (keys[0], keys[1]);
    let now = world.now;
    let node = world.nodes.get_mut(&liar).unwrap();
    let index = node.members.find(victim).unwrap();
    let suspicion = node.notary.accuse(victim, node.members.get(index).unwrap().record.seq);
    node.suspect(index, suspicion, 0, now);
    for _ in 0..1000 {
        world.step();
        assert!(
            world.keys().iter().all(|at| world.state(*at, victim) != Some(State::Dead)),
            "it was believed"
        );
    }
    assert_eq!(world.nodes[&victim].counts().refuted, 1);
    assert!(world.keys().iter().all(|at| world.state(*at, victim) == Some(State::Alive)));
}

#[test]
fn the_dead_are_forgotten_after_a_while() {
    let mut world = World::settled(4);
    let keys = world.keys();
    world.hold(keys[0], 1, true);
    world.until("all know", 1000, |world| world.holders(keys[1], 1) == [keys[0]]);
    world.kill(keys[0]);
    world.run(FORGET / 2);
    assert!(world.state(keys[1], keys[0]).is_some());
    world.run(FORGET / 2 + 30_000);
    assert!(keys[1..].iter().all(|at| world.state(*at, keys[0]).is_none()));
    assert!(keys[1..].iter().all(|at| world.nodes[at].holdings().holders(1).is_none()));
}

#[test]
fn a_third_dies_at_once_and_the_rest_stays_one() {
    let mut world = World::settled(45);
    let keys = world.keys();
    for key in keys.iter().step_by(3) {
        world.vanish(*key);
    }
    world.hold(keys[1], 1, true);
    let took = world.until("the rest is one", 8000, |world| {
        world.is_one() && world.nodes.values().all(|node| node.members().live() == 30)
    });
    println!("one again after {took} ms");
    world.hold(keys[2], 2, true);
    world.until("a change gets to all", 2000, |world| {
        world.keys().iter().all(|at| world.holders(*at, 2) == [keys[2]])
    });
}

#[test]
fn two_halves_find_each_other_again() {
    let mut world = World::settled(16);
    let keys = world.keys();
    for a in &keys[..8] {
        for b in &keys[8..] {
            world.cut.insert((*a, *b));
        }
    }
    world.until("two halves", 40_000, |world| world.nodes.values().all(|node| node.members().live() == 8));
    world.run(30_000);
    world.cut.clear();
    world.until("one again", 120_000, |world| {
        world.is_one() && world.nodes.values().all(|node| node.members().live() == 16)
    });
}

#[test]
fn all_start_again_within_a_minute() {
    let mut world = World::settled(15);
    let keys = world.keys();
    for key in &keys {
        world.kill(*key);
        world.restart(*key, 300, Limits::default());
        let other = *keys.iter().find(|other| *other != key).unwrap();
        world.connect(*key, other);
        world.run(4000);
    }
    world.until("one again", 30_000, |world| {
        world.is_one() && world.nodes.values().all(|node| node.members().live() == 15)
    });
}

#[test]
fn an_identity_that_two_have_is_reported() {
    let mut world = World::settled(4);
    let keys = world.keys();
    let twin = {
        let notary = Arc::new(Mark { key: keys[0], barred: Arc::clone(&world.barred) });
        let mut twin =
            Gossip::new(draft(keys[0], 5000), notary, Index::default(), Limits::default(), 9, world.now);
        twin.draft.process = 4711;
        let now = world.now;
        twin.reseal(5000, now);
        twin
    };
    let record = Arc::clone(&twin.members().own().record);
    let now = world.now;
    let node = world.nodes.get_mut(&keys[0]).unwrap();
    node.take_record(Arc::clone(&record), None, 0, now);
    assert!(node.actions().is_empty(), "the first may be an earlier life");
    let mut next = (*record).clone();
    next.seq += 10;
    node.take_record(Arc::new(next), None, 0, now);
    assert_eq!(node.actions(), [Action::Twin(keys[0])]);
    // The others see records of the two by turns.
    let node = world.nodes.get_mut(&keys[1]).unwrap();
    for process in [1, 2, 1] {
        let mut other = (*record).clone();
        other.process = process;
        other.seq = node.members().by_key(keys[0]).unwrap().record.seq + 1;
        node.take_record(Arc::new(other), None, 0, now);
    }
    assert_eq!(node.actions(), [Action::Twin(keys[0])]);
}
