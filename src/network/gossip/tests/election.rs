//! What the gossip does for elections: who is dialled first, and what neighbours make of their views.

use super::*;

/// A node that starts with a view dials one of those that it was told first, and is not alone with it.
#[test]
fn introducers_are_dialled_first_and_then_others() {
    let mut world = World::settled(12);
    world.bootstraps = false;
    let keys = world.keys();
    let (key, first) = (keys[3], keys[7]);
    let kept: Vec<_> = world.nodes[&key].kept().collect();
    world.kill(key);
    world.run(3000);
    world.restart(key, 500, Limits::default());
    let now = world.now;
    let node = world.nodes.get_mut(&key).unwrap();
    node.restore(kept, true, now);
    node.dial_first(vec![key, first]);
    node.tick(now);
    assert_eq!(node.actions(), [Action::Dial(first)]);
    assert_eq!(node.counts().introduced, 1);
    world.connect(key, first);
    world.until("it has neighbours", 5000, |world| world.nodes[&key].neighbours().count() >= NEIGHBOURS);
    assert_eq!(world.nodes[&key].counts().introduced, 1, "only who has no neighbour asks for them");

    // One that cannot be reached keeps nobody out.
    let kept: Vec<_> = world.nodes[&key].kept().collect();
    world.kill(key);
    world.cut.insert((key, first));
    world.restart(key, 600, Limits::default());
    let now = world.now;
    let node = world.nodes.get_mut(&key).unwrap();
    node.restore(kept, true, now);
    node.dial_first(vec![first]);
    world.until("it has neighbours", 5000, |world| world.nodes[&key].neighbours().count() >= 3);
}

/// Neighbours are told when views are compared, and not before.
#[test]
fn opinions_travel_with_comparisons() {
    let mut world = World::settled(3);
    let keys = world.keys();
    for (number, key) in (1..).zip(&keys) {
        let node = world.nodes.get_mut(key).unwrap();
        node.set_opinion(number, 10 * number);
    }
    world.until("they have compared", 10 * QUIET_COMPARE, |world| {
        keys.iter().all(|key| world.nodes[key].opinions().count() == 2)
    });
    for (number, key) in (1..).zip(&keys) {
        let heard: HashSet<(u32, u32)> = world.nodes[key].opinions().collect();
        let expected: HashSet<(u32, u32)> =
            (1..=3).filter(|other| *other != number).map(|other| (other, 10 * other)).collect();
        assert_eq!(heard, expected);
    }
}
