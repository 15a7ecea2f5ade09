//! Peers that send what they should not.

use std::collections::HashSet;

use super::*;

#[tokio::test]
async fn small_wrong_content_is_found_before_the_first_byte_and_asked_of_the_next() {
    let lab = Lab::new(2);
    let (artifact, layer, bytes) = image("library/app", MIB);
    let (other, other_layer, other_bytes) = image("library/other", MIB);
    for holder in 0..2 {
        lab.hold(holder, &artifact);
        lab.hold(holder, &other);
    }
    lab.fault(0, Fault::Lie);
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
    let asked = lab.asked(0);
    assert!(asked > 0 && lab.conduct(0).digest_mismatches == 1, "the liar was not asked");
    assert_eq!(lab.conduct(1).digest_mismatches, 0);
    // It is left out for that content and for no other, and is no worse a peer otherwise.
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
    assert_eq!(lab.asked(0), asked);
    assert!(!lab.conduct(0).suspected);
    lab.fault(0, Fault::None);
    // Small by its manifest: it is verified before a byte of it is passed on.
    lab.manifest("library/other", other.target.digest).await.unwrap();
    assert!(lab.blob(&other_layer).await.unwrap().0 == other_bytes);
    assert!(lab.asked(0) > asked);
}

#[tokio::test]
async fn a_small_wrong_manifest_is_asked_of_the_next() {
    let lab = Lab::new(2);
    let (artifact, _, _) = image("library/app", 10);
    lab.hold(0, &artifact);
    lab.hold(1, &artifact);
    lab.fault(0, Fault::Lie);
    let answer = lab.manifest("library/app", artifact.target.digest).await.unwrap();
    assert_eq!(answer.descriptor, artifact.target);
    assert_eq!(Digest::sha256(&read(answer).await.unwrap()), artifact.target.digest);
    assert!(lab.asked(0) > 0);
}

#[tokio::test]
async fn where_all_lie_nothing_is_passed_on() {
    let lab = Lab::new(3);
    let (artifact, layer, _) = image("library/app", MIB);
    for holder in 0..3 {
        lab.hold(holder, &artifact);
        lab.fault(holder, Fault::Lie);
    }
    assert_eq!(lab.refused(&layer).await.0, NotHere::PeersFailed);
    let refusal = lab.manifest("library/app", artifact.target.digest).await.map(drop).unwrap_err();
    assert_eq!(refusal, Refusal::NotHere(NotHere::PeersFailed));
    assert!((0..3).all(|holder| lab.asked(holder) > 0));
    // The runtime's own download has begun and gets the right bytes from its next host: it must not be taken away.
    assert!(lab.store.discarded().is_empty());
}

#[tokio::test]
async fn large_wrong_content_never_comes_whole_and_does_not_stay() {
    let lab = Lab::new(2);
    let size = 6 * MIB;
    let (artifact, layer, bytes) = image("library/app", size);
    lab.hold(0, &artifact);
    lab.fault(0, Fault::Lie);
    let (got, failed) = read_until_error(lab.open(&layer, None).await.unwrap()).await;
    assert!(failed, "the stream ended as if all was well");
    assert!(got.len() <= size - verify::HOLD_BACK, "{} of {size} bytes were passed on", got.len());
    assert_eq!(lab.store.discarded(), [layer], "the runtime would resume on top of it");
    assert_eq!(lab.conduct(0).digest_mismatches, 1);
    // The next attempt does not go to the liar, and begins at byte 0.
    let asked = lab.asked(0);
    assert_eq!(lab.refused(&layer).await.0, NotHere::PeersFailed);
    lab.hold(1, &artifact);
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
    assert_eq!(lab.asked(0), asked);
}

/// What the runtime got of a liar and nobody judged goes with its lie, before the stream that gave it away ends: the next
/// attempt would else begin on top of it. That is what it hung up on, and what is still on its way.
#[tokio::test]
async fn what_else_came_from_a_liar_unverified_is_discarded() {
    for hangs_up in [true, false] {
        let lab = Lab::new(1);
        let (first, first_layer, _) = image("library/first", 6 * MIB);
        let (second, second_layer, _) = image("library/second", 6 * MIB);
        let (third, third_layer, bytes) = image("library/third", 6 * MIB);
        for artifact in [&first, &second, &third] {
            lab.hold(0, artifact);
        }
        // What came right is not in doubt.
        assert!(lab.blob(&third_layer).await.unwrap().0 == bytes);
        lab.fault(0, Fault::Lie);
        let mut other = lab.open(&second_layer, None).await.unwrap();
        other.body.next().await.unwrap().unwrap();
        let running = (!hangs_up).then_some(other);
        assert!(read_until_error(lab.open(&first_layer, None).await.unwrap()).await.1);
        assert_eq!(discarded(&lab), [second_layer, first_layer].into());
        drop(running);
        assert_eq!(lab.refused(&second_layer).await.0, NotHere::PeersFailed);
    }
}

fn discarded(lab: &Lab) -> HashSet<Digest> {
    lab.store.discarded().into_iter().collect()
}

/// Of small content nothing was passed on: the runtime's downloads get the right bytes elsewhere, and must not be taken away
/// because one of them was wrong.
#[tokio::test]
async fn small_content_on_its_way_from_a_liar_is_not_discarded() {
    let lab = Lab::new(1);
    let images: Vec<_> = (0..3).map(|n| image(&format!("library/app{n}"), MIB)).collect();
    for (artifact, _, _) in &images {
        lab.hold(0, artifact);
    }
    lab.fault(0, Fault::Lie);
    let refused = images.iter().map(|(_, layer, _)| lab.refused(layer));
    futures::future::join_all(refused).await;
    assert!(lab.asked(0) >= 3 && lab.conduct(0).digest_mismatches >= 3);
    assert!(lab.store.discarded().is_empty());
}

/// Which of two sources lied cannot be told: what the runtime got of either and nobody judged goes.
#[tokio::test]
async fn what_came_from_two_sources_is_discarded_with_the_lie_of_one() {
    let lab = Lab::new(2);
    let (mixed, mixed_layer, _) = image("library/mixed", 12 * MIB);
    let (left, left_layer, _) = image("library/left", 6 * MIB);
    lab.hold(0, &mixed);
    lab.hold(0, &left);
    let mut hung_up = lab.open(&left_layer, None).await.unwrap();
    hung_up.body.next().await.unwrap().unwrap();
    drop(hung_up);
    let mut answer = lab.open(&mixed_layer, None).await.unwrap();
    answer.body.next().await.unwrap().unwrap();
    // The first one goes on from here.
    lab.hold(1, &mixed);
    lab.fault(0, Fault::BreakAfter(0));
    lab.fault(1, Fault::Lie);
    assert!(read_until_error(answer).await.1);
    assert_eq!(discarded(&lab), [left_layer, mixed_layer].into());
    assert!((0..2).all(|holder| lab.conduct(holder).digest_mismatches == 1));
}

/// A client that is gone when the digest turns out to be wrong leaves its bad prefix behind all the same.
#[tokio::test]
async fn a_client_that_hangs_up_during_the_verdict_does_not_keep_the_poison() {
    let lab = Lab::new(1);
    let (artifact, layer, _) = image("library/app", 6 * MIB);
    lab.hold(0, &artifact);
    lab.fault(0, Fault::Lie);
    let mut answer = lab.open(&layer, None).await.unwrap();
    let mut got = 0;
    while got < 6 * MIB - verify::HOLD_BACK {
        got += answer.body.next().await.unwrap().unwrap().len();
    }
    drop(answer);
    // It was left unverified; the next lie of the same peer says what to think of it.
    assert!(lab.store.discarded().is_empty());
    let (other, other_layer, _) = image("library/other", 6 * MIB);
    lab.hold(0, &other);
    assert!(read_until_error(lab.open(&other_layer, None).await.unwrap()).await.1);
    assert_eq!(discarded(&lab), [layer, other_layer].into());
}

/// What was left without a verdict is looked after: a wrong prefix would be resumed on elsewhere, and end wrong.
#[tokio::test]
async fn a_download_that_was_left_and_ends_wrong_is_discarded_and_its_source_left_out() {
    let lab = Lab::new(1);
    let (artifact, layer, bytes) = image("library/app", 6 * MIB);
    let (whole, whole_layer, _) = image("library/whole", 6 * MIB);
    lab.hold(0, &artifact);
    lab.hold(0, &whole);
    lab.blob(&whole_layer).await.unwrap();
    // A hang-up, a part, and a source that ends early; nothing is wrong with the first two.
    for (number, range) in [(1, None), (2, Some("bytes=5-")), (3, None)] {
        if number == 3 {
            lab.store.stick(&layer);
            lab.fault(0, Fault::BreakAfter(300_000));
        }
        let mut answer = lab.open(&layer, range).await.unwrap();
        let first = answer.body.next().await.unwrap().unwrap();
        assert!(number == 2 || bytes.starts_with(&first));
        drop(answer);
        until("it is looked after", || lab.store.watched() == vec![layer; number]).await;
    }
    until("its source is known", || lab.conduct(0).digest_mismatches == 1).await;
    lab.fault(0, Fault::None);
    assert_eq!(lab.refused(&layer).await.0, NotHere::PeersFailed);
}

/// Known liars give nothing any more that would reach the runtime unverified; small content is verified first.
#[tokio::test]
async fn a_liar_is_left_out_for_all_that_is_streamed() {
    let lab = Lab::new(1);
    let (first, first_layer, _) = image("library/first", 6 * MIB);
    let (second, second_layer, _) = image("library/second", 6 * MIB);
    let (small, small_layer, bytes) = image("library/small", MIB);
    for artifact in [&first, &second, &small] {
        lab.hold(0, artifact);
    }
    lab.fault(0, Fault::Lie);
    assert!(read_until_error(lab.open(&first_layer, None).await.unwrap()).await.1);
    lab.fault(0, Fault::None);
    assert_eq!(lab.refused(&second_layer).await.0, NotHere::PeersFailed);
    let range = lab.open(&second_layer, Some("bytes=5-")).await.map(drop).unwrap_err();
    assert_eq!(range, Refusal::NotHere(NotHere::PeersFailed));
    // What may be large is asked of it no more; what its manifest says is small is.
    assert_eq!(lab.refused(&small_layer).await.0, NotHere::PeersFailed);
    lab.manifest("library/small", small.target.digest).await.unwrap();
    assert!(lab.blob(&small_layer).await.unwrap().0 == bytes);
}

#[tokio::test]
async fn verification_can_be_turned_off() {
    let config = Config { verify: false, ..Config::default() };
    let lab = Lab::with(1, &config);
    let (artifact, layer, _) = image("library/app", MIB);
    lab.hold(0, &artifact);
    lab.fault(0, Fault::Lie);
    let (got, _) = lab.blob(&layer).await.unwrap();
    assert_ne!(Digest::sha256(&got), layer);
    // Manifests are small and many things hang on them: they are verified all the same.
    assert!(lab.manifest("library/app", artifact.target.digest).await.is_err());
}

#[tokio::test]
async fn a_claim_that_is_not_true_costs_one_question() {
    let lab = Lab::new(2);
    let (artifact, layer, bytes) = image("library/app", MIB);
    lab.hub.claim(&lab.holders[0].id, layer);
    assert_eq!(lab.refused(&layer).await.0, NotHere::PeersFailed);
    assert_eq!((lab.asked(0), lab.conduct(0).misses), (1, 1));
    assert_eq!(lab.refused(&layer).await.0, NotHere::PeersFailed);
    assert_eq!(lab.asked(0), 1);
    lab.hold(1, &artifact);
    assert!(lab.blob(&layer).await.unwrap().0 == bytes);
    assert!(!lab.conduct(0).suspected);
}
