use super::*;

fn members(count: u32) -> Vec<(u64, u32)> {
    (0..count).map(|n| (mark(&format!("member-{n}")), 100)).collect()
}

fn owners(members: &[(u64, u32)], keys: u64) -> Vec<u32> {
    let table = Table::new(members.iter().copied());
    (0..keys).map(|n| table.owner(key("tag-home", &n.to_be_bytes())).unwrap()).collect()
}

/// Recorded once: another result is another election, which nodes of two versions would not agree on.
#[test]
fn golden() {
    assert_eq!(mark("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"), GOLDEN_MARK);
    assert_eq!(key("tag-home", b"docker.io/library/nginx:1.27"), GOLDEN_KEY);
    for (bits, expected) in GOLDEN_COSTS {
        assert_eq!(cost(bits), expected, "{bits:#x}");
    }
    assert_eq!(draw(1, 2), GOLDEN_DRAW);
    let weighted: Vec<(u64, u32)> = members(10)
        .into_iter()
        .enumerate()
        .map(|(at, (mark, _))| (mark, [0, 1, 10, 100, 1000][at % 5]))
        .collect();
    assert_eq!(owners(&weighted, 16), GOLDEN_OWNERS);
    assert_eq!(Table::new(weighted.clone()).order(7), GOLDEN_ORDER);
    assert_eq!(ranked(&weighted, 7), GOLDEN_RANKED);
}

const GOLDEN_MARK: u64 = 0xd489_61b5_1758_586e;
const GOLDEN_KEY: u64 = 0x7c09_6962_742b_4ff4;
const GOLDEN_DRAW: u64 = 0x1e53_5eed_e314_28f0;
/// By decimals of 60 digits, in another language.
const GOLDEN_COSTS: [(u64, u64); 7] = [
    (0, 274877906944),
    (1, 274877906944),
    (3, 268070544839),
    (1 << 63, 4294967296),
    (u64::MAX / 3, 6807362106),
    (u64::MAX - (1 << 40), 370),
    (u64::MAX, 1),
];
const GOLDEN_OWNERS: [u32; 16] = [9, 9, 4, 4, 4, 4, 3, 9, 4, 4, 9, 9, 4, 9, 9, 4];
const GOLDEN_ORDER: [u32; 8] = [4, 3, 9, 7, 8, 6, 2, 1];
const GOLDEN_RANKED: [u32; 8] = [4, 9, 3, 8, 7, 2, 6, 1];

/// The logarithm is that of the mathematics, rounded up.
#[test]
fn costs_are_logarithms() {
    for n in 1..20_000_u64 {
        let bits = draw(n, 77) >> (n % 60);
        let exact = 64.0 - (bits.max(1) as f64).log2();
        let found = cost(bits) as f64 / f64::from(1 << 16) / f64::from(1 << 16);
        assert!((found - exact).abs() < 1e-9, "{bits}: {found}, not {exact}");
    }
    // Monotone also where draws are almost equal.
    for n in 0..1000 {
        assert!(cost(u64::MAX - n * (1 << 20)) <= cost(u64::MAX - (n + 1) * (1 << 20)));
    }
}

/// What `owner` leaves out by its bound changes nothing.
#[test]
fn the_quick_way_finds_what_the_whole_order_has_first() {
    for weights in [&[1, 1000][..], &[500, 501, 502], &[1, 2, 3, 5, 8, 13, 1000]] {
        let many: Vec<(u64, u32)> = members(40)
            .into_iter()
            .enumerate()
            .map(|(at, (mark, _))| (mark, weights[at % weights.len()]))
            .collect();
        let table = Table::new(many);
        for n in 0..2_000_u64 {
            let key = key("r", &n.to_be_bytes());
            assert_eq!(table.owner(key), table.order(key).first().copied());
        }
    }
    assert_eq!((Table::new([]).owner(1), Table::new([(1, 0)]).owner(1)), (None, None));
}

#[test]
fn only_the_keys_of_who_goes_move() {
    const KEYS: u64 = 10_000;
    for count in [3, 10, 50] {
        let mut all = members(count);
        let before = owners(&all, KEYS);
        all[1].1 = 0;
        let after = owners(&all, KEYS);
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert!(before.iter().zip(&after).all(|(before, after)| before == after || *before == 1));
        // The share of one, and four standard deviations.
        let share = KEYS as f64 / f64::from(count);
        assert!((moved as f64 - share).abs() < 4.0 * share.sqrt(), "{moved} of {count}");
    }
}

#[test]
fn a_change_of_one_weight_moves_keys_to_it_or_from_it_only() {
    let mut all = members(20);
    let before = owners(&all, 10_000);
    all[3].1 = 300;
    let after = owners(&all, 10_000);
    assert!(before.iter().zip(&after).all(|(before, after)| before == after || *after == 3));
    assert_ne!(before, after);
}

/// Chi-squared over 100,000 keys: shares are as the weights.
#[test]
fn shares_are_as_weights() {
    const KEYS: u64 = 100_000;
    let weights = [1_u32, 1, 2, 5, 10, 50, 100, 333, 1000, 1000];
    let all: Vec<(u64, u32)> =
        members(10).into_iter().zip(weights).map(|((mark, _), weight)| (mark, weight)).collect();
    let sum: u32 = weights.iter().sum();
    let mut counts = [0_u32; 10];
    owners(&all, KEYS).into_iter().for_each(|owner| counts[owner as usize] += 1);
    let chi: f64 = counts
        .iter()
        .zip(weights)
        .map(|(count, weight)| {
            let expected = KEYS as f64 * f64::from(weight) / f64::from(sum);
            (f64::from(*count) - expected).powi(2) / expected
        })
        .sum();
    // Of nine degrees of freedom, one in ten thousand is above 33.7.
    assert!(chi < 33.7, "chi-squared {chi}: {counts:?}");
}

#[test]
fn the_ranked_go_by_weight_and_then_by_draw() {
    let all = [(1, 5), (2, 0), (3, 9), (4, 5), (5, 5)];
    let order = ranked(&all, 42);
    assert_eq!((order[0], order.len()), (2, 4));
    let draws: Vec<u64> = order[1..].iter().map(|place| draw(42, all[*place as usize].0)).collect();
    assert!(draws.is_sorted_by(|a, b| a >= b), "{draws:?}");
}
