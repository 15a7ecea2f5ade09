//! A node that starts again with the view that it kept.

use super::*;
use crate::network::gossip::wire::Bulk;

/// Eight nodes, of which one holds 300 contents; and that one, and what it keeps.
fn keeper() -> (World, Key, Vec<Bulk>) {
    let mut world = World::settled(8);
    let keys = world.keys();
    let key = keys[2];
    let contents: HashSet<u64> = (0..300).map(|n| 100_000 + n).collect();
    let now = world.now;
    world.nodes.get_mut(&key).unwrap().hold_all(&contents, now);
    world.hold(keys[4], 7, true);
    world.until("all know", 3000, |world| world.is_one() && world.holders(keys[5], 100_299) == [key]);
    let kept = world.nodes[&key].kept().collect();
    (world, key, kept)
}

fn restore(world: &mut World, key: Key, seq: u64, kept: Vec<Bulk>, fresh: bool) {
    world.restart(key, seq, Limits::default());
    let now = world.now;
    assert_eq!(world.nodes.get_mut(&key).unwrap().restore(kept, fresh, now), 7);
}

fn hold_all(world: &mut World, key: Key, contents: impl Iterator<Item = u64>) {
    let now = world.now;
    world.nodes.get_mut(&key).unwrap().hold_all(&contents.collect(), now);
}

/// Nothing of an inventory goes over the links but what has changed, from some neighbours at once.
#[test]
fn a_restart_costs_the_difference() {
    let (mut world, key, kept) = keeper();
    let other = world.keys()[5];
    world.kill(key);
    world.run(3000);
    world.hold(other, 8, true);
    world.run(500);
    let told = world.nodes[&other].members().by_key(key).unwrap().version;
    restore(&mut world, key, 200, kept, true);
    // What it knew it knows at once.
    assert_eq!(world.holders(key, 7), [world.keys()[4]]);
    world.inventories = 0;
    let took = world.until("its view is complete", 900, |world| {
        world.nodes[&key].is_complete() && world.is_one() && world.holders(key, 8) == [other]
    });
    println!("complete after {took} ms");
    assert!(world.inventories <= 10 * 8, "{} bytes of inventories", world.inventories);
    // It has not looked at its store yet, and tells nobody that it holds nothing.
    world.run(3000);
    assert_eq!(world.holders(other, 100_299), [key]);
    hold_all(&mut world, key, (1..300).map(|n| 100_000 + n));
    world.until("the difference is known", 1000, |world| world.holders(other, 100_000).is_empty());
    let member = world.nodes[&other].members().by_key(key).unwrap();
    assert_eq!((member.version, member.count), (told + 1, 299));
}

/// What others know of it is newer than what it kept.
#[test]
fn what_was_told_after_it_was_kept_is_told_rightly_in_the_end() {
    let (mut world, key, kept) = keeper();
    let other = world.keys()[5];
    world.hold(key, 9, true);
    world.hold(key, 100_001, false);
    world.until("all know", 1000, |world| world.holders(other, 9) == [key]);
    world.kill(key);
    world.run(3000);
    restore(&mut world, key, 200, kept, true);
    // Nor is 9 held any more.
    hold_all(&mut world, key, (2..300).map(|n| 100_000 + n));
    world.until("all know", 10_000, |world| {
        world.is_one()
            && [9, 100_000, 100_001].iter().all(|content| world.holders(other, *content).is_empty())
            && world.holders(other, 100_002) == [key]
    });
}

#[test]
fn who_died_meanwhile_does_not_live_again() {
    let (mut world, key, kept) = keeper();
    let keys = world.keys();
    let (dead, left) = (keys[0], keys[1]);
    world.kill(key);
    let now = world.now;
    world.nodes.get_mut(&left).unwrap().leave(now);
    world.run(50);
    world.kill(left);
    world.kill(dead);
    world.run(5000);
    assert!(world.keys().iter().all(|at| world.state(*at, left) == Some(State::Left)));
    restore(&mut world, key, 200, kept, true);
    world.until("it knows", 5000, |world| {
        world.state(key, dead) == Some(State::Dead) && world.state(key, left) == Some(State::Left)
    });
    world.run(3000);
    assert!(world.keys().iter().all(|at| world.state(*at, dead) == Some(State::Dead)));
    assert!(world.is_one());
}

/// An old view is worth its addresses.
#[test]
fn members_that_are_remembered_are_found_again_without_any_other_source() {
    let (mut world, key, kept) = keeper();
    world.kill(key);
    world.bootstraps = false;
    world.run(20_000);
    restore(&mut world, key, 200, kept, false);
    assert!(world.holders(key, 7).is_empty());
    assert_eq!(world.state(key, world.keys()[4]), Some(State::Remembered));
    let took = world.until("it is one of them again", 5000, |world| {
        world.nodes[&key].is_complete() && world.is_one() && world.nodes[&key].members().live() == 8
    });
    println!("joined after {took} ms");
}

/// Nobody of whom it kept is there any more.
#[test]
fn a_view_of_the_dead_is_given_up() {
    for fresh in [true, false] {
        let (mut world, key, kept) = keeper();
        for other in world.keys() {
            world.kill(other);
        }
        world.bootstraps = false;
        restore(&mut world, key, 200, kept, fresh);
        world.until("they are dead, and it is alone", 10_000, |world| {
            let node = &world.nodes[&key];
            node.members().live() == 1 && node.is_complete() && world.holders(key, 7).is_empty()
        });
        world.run(FORGET + FORGET / 30);
        assert_eq!(world.nodes[&key].members().known(), 1);
    }
}

/// It does not believe a member that all others believe, so that no comparison finds two views the same.
#[test]
fn a_view_that_is_like_no_other_is_complete_all_the_same() {
    let (mut world, key, kept) = keeper();
    let refused = world.keys()[0];
    world.kill(key);
    world.barred = Arc::new(Mutex::new(HashSet::from([refused])));
    world.cut.insert((key, refused));
    world.restart(key, 200, Limits::default());
    let now = world.now;
    assert_eq!(world.nodes.get_mut(&key).unwrap().restore(kept, true, now), 6);
    let took = world.until("its view is complete", 5000, |world| world.nodes[&key].is_complete());
    println!("complete after {took} ms");
    assert!(world.state(key, refused).is_none());
}
