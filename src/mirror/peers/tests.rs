//! Who is asked, in which order, and who is not.

use super::exclusions::EXCLUSIONS;
use super::*;

fn peer(letter: char, zone: &str) -> Arc<Peer> {
    let id = format!("12D3KooW{}", letter.to_string().repeat(44));
    Arc::new(Peer {
        id: id.parse().unwrap(),
        transfer: Vec::new(),
        node: String::new(),
        zone: zone.into(),
        version: String::new(),
    })
}

fn peers() -> (Arc<Peers>, Digest, Instant) {
    (Arc::new(Peers::new("here".into())), Digest::sha256(b""), Instant::now())
}

/// A request to `a` ended so.
fn end(peers: &Peers, outcome: Outcome, at: Instant) -> bool {
    let candidate = Candidate { peer: peer('a', ""), trial: false };
    peers.end(&candidate, &Digest::sha256(b""), outcome, at)
}

fn names(candidates: &[Candidate]) -> Vec<&str> {
    candidates.iter().map(|candidate| candidate.peer.id.short()).collect()
}

#[test]
fn a_failed_peer_is_left_out_then_tried_once_then_used() {
    let (peers, digest, now) = peers();
    let candidates = |at| peers.candidates(vec![peer('a', "")], &digest, false, at);
    let first = candidates(now);
    drop(peers.begin(&first[0]));
    assert!(peers.end(&first[0], &digest, Outcome::Failed, now));
    assert!(candidates(now).is_empty());

    let later = now + SUSPICION_MIN;
    let trial = candidates(later);
    assert!(trial[0].trial);
    drop(peers.begin(&trial[0]));
    assert!(candidates(later).is_empty(), "one trial at a time");
    // The end of a request from before is not the end of the trial.
    end(&peers, Outcome::Slow, later);
    assert!(candidates(later).is_empty());
    peers.end(&trial[0], &digest, Outcome::Failed, later);
    assert!(candidates(later + SUSPICION_MIN).is_empty(), "doubled");

    let later = later + SUSPICION_MIN * 2;
    let trial = candidates(later);
    drop(peers.begin(&trial[0]));
    peers.end(&trial[0], &digest, Outcome::FirstByte(Duration::ZERO), later);
    assert!(!candidates(later)[0].trial);
}

#[test]
fn only_time_forgives_failures() {
    let (peers, digest, now) = peers();
    let is_left_out = |at| peers.candidates(vec![peer('a', "")], &digest, false, at).is_empty();
    let mut at = now;
    for left_out in [1, 2, 4] {
        assert!(peers.failed(&peer('a', "").id, at));
        assert!(is_left_out(at + Duration::from_secs(left_out) - Duration::from_millis(1)), "{left_out}");
        at += Duration::from_secs(left_out);
        assert!(!is_left_out(at));
        // It answers, and stalls later.
        end(&peers, Outcome::FirstByte(Duration::ZERO), at);
    }
    at += FORGIVEN + Duration::from_secs(1);
    peers.failed(&peer('a', "").id, at);
    assert!(!is_left_out(at + SUSPICION_MIN));
}

#[test]
fn failures_of_one_moment_count_once() {
    let (peers, digest, now) = peers();
    for _ in 0..20 {
        end(&peers, Outcome::Failed, now);
    }
    assert_eq!(peers.candidates(vec![peer('a', "")], &digest, false, now + SUSPICION_MIN).len(), 1);
}

/// One that sends to some and answers nothing new is suspected in the end; one that answers now and then is not.
#[test]
fn a_peer_is_not_slow_for_ever() {
    let (peers, _, now) = peers();
    let ms = |at| now + Duration::from_millis(at);
    assert!(!end(&peers, Outcome::Slow, ms(0)));
    assert!(!end(&peers, Outcome::Slow, ms(900)));
    end(&peers, Outcome::FirstByte(Duration::ZERO), ms(950));
    assert!(!end(&peers, Outcome::Slow, ms(1200)));
    assert!(!end(&peers, Outcome::Queued, ms(9000)));
    assert!(end(&peers, Outcome::Slow, ms(2300)));
}

#[test]
fn a_liar_is_left_out_for_that_content_only() {
    let (peers, _, now) = peers();
    let (wrong, other) = (Digest::sha256(b"wrong"), Digest::sha256(b"other"));
    peers.lied(&[peer('a', "").id.clone()], &wrong, now);
    let both = || vec![peer('a', ""), peer('b', "")];
    assert_eq!(names(&peers.candidates(both(), &wrong, false, now)), ["bbbbbbbb"]);
    assert_eq!(peers.candidates(both(), &other, false, now).len(), 2);
    // What goes to the runtime before it is verified is not asked of it.
    assert_eq!(names(&peers.candidates(both(), &other, true, now)), ["bbbbbbbb"]);
    assert_eq!(peers.candidates(both(), &wrong, false, now + LIE_TTL).len(), 2);
    assert_eq!(peers.conduct(now)[&peer('a', "").id].digest_mismatches, 1);
}

/// What goes to the runtime before it is verified is not asked of a known liar; where two had a part, nobody is known.
#[test]
fn only_who_was_alone_is_a_known_liar() {
    let (peers, other, now) = peers();
    let (a, b) = (peer('a', "").id.clone(), peer('b', "").id.clone());
    let streamed = || peers.candidates(vec![peer('a', ""), peer('b', "")], &other, true, now).len();
    peers.lied(&[a.clone(), b], &Digest::sha256(b"mixed"), now);
    assert_eq!(streamed(), 2);
    peers.lied(&[a], &Digest::sha256(b"wrong"), now);
    assert_eq!(streamed(), 1);
    assert_eq!(peers.candidates(vec![peer('a', "")], &other, false, now).len(), 1);
}

#[test]
fn what_a_liar_gave_unverified_is_doubted_unless_it_was_begun_anew() {
    let (peers, _, now) = peers();
    let (a, b) = (peer('a', "").id.clone(), peer('b', "").id.clone());
    let digest = |name: &str| Digest::sha256(name.as_bytes());
    assert!(!peers.left_unverified(&[a.clone(), b.clone()], &digest("left"), now));
    peers.left_unverified(std::slice::from_ref(&a), &digest("anew"), now);
    peers.left_unverified(std::slice::from_ref(&b), &digest("of b"), now);
    peers.begins_anew(&digest("anew"));
    let doubted = peers.lied(std::slice::from_ref(&a), &digest("wrong"), now);
    assert_eq!(doubted, [digest("left")].into());
    assert!(peers.candidates(vec![peer('a', "")], &digest("left"), false, now).is_empty());
    // Told once; what comes later is doubted at once.
    assert!(peers.lied(std::slice::from_ref(&a), &digest("wrong"), now).is_empty());
    assert!(peers.left_unverified(&[b, a], &digest("later"), now));
}

#[test]
fn own_zone_first_and_the_less_loaded_of_two() {
    let (peers, digest, now) = peers();
    end(&peers, Outcome::Busy(9), now);
    let mut first = HashMap::new();
    for _ in 0..200 {
        let holders = vec![peer('a', "here"), peer('b', "here"), peer('c', "there")];
        let candidates = peers.candidates(holders, &digest, false, now);
        assert_eq!(candidates.len(), 3);
        assert_eq!(candidates[2].peer.id, peer('c', "").id);
        *first.entry(candidates[0].peer.id.short().to_owned()).or_insert(0) += 1;
    }
    // Two random choices pick the loaded one only if both fall on it: a quarter of the time.
    assert!(first["bbbbbbbb"] > 110, "{first:?}");
}

/// Misses, of which there may be many, do not push out lies, which last.
#[test]
fn exclusions_are_bounded_and_the_shortest_go_first() {
    let (peers, digest, now) = peers();
    let wrong = Digest::sha256(b"wrong");
    peers.lied(&[peer('a', "").id.clone()], &wrong, now);
    let candidate = Candidate { peer: peer('a', ""), trial: false };
    for number in 0..EXCLUSIONS as u32 + 50 {
        peers.end(&candidate, &Digest::sha256(&number.to_be_bytes()), Outcome::Miss, now);
    }
    assert!(peers.lock().exclusions.len() <= EXCLUSIONS);
    assert!(peers.candidates(vec![peer('a', "")], &wrong, false, now).is_empty());
    assert_eq!(peers.candidates(vec![peer('a', "")], &digest, false, now).len(), 1);
}

#[test]
fn hedges_follow_the_samples_and_are_limited() {
    let (peers, _, now) = peers();
    assert_eq!(peers.hedge_after(), HEDGE_DEFAULT);
    for _ in 0..SAMPLES {
        end(&peers, Outcome::FirstByte(Duration::from_millis(20)), now);
    }
    assert_eq!(peers.hedge_after(), Duration::from_millis(20));
    assert_eq!((0..100).filter(|_| peers.may_hedge()).count(), 10);
}
