//! Sets of globs over names such as `docker.io/library/nginx`, asked in a time that depends on the name and hardly on their
//! number.
//!
//! `*` stands for any letters of one segment, `?` for one letter, `**` as a whole segment for any segments, also none. The
//! host's own patterns (`trust.allow`) mean the same.

use std::collections::BTreeMap;

/// Segments that are `**`, in one glob: each multiplies the ways in which a name can match.
const DEEP: usize = 3;
/// Longest glob, in bytes: a name is at most 255.
const LONGEST: usize = 512;

/// A set of globs.
#[derive(Clone, Debug, Default)]
pub struct Globs {
    root: Node,
    count: usize,
}

/// Why a glob is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobError {
    /// Its place in the list.
    pub index: usize,
    /// What is wrong with it.
    pub message: String,
}

/// The globs that have the same segments up to here.
#[derive(Clone, Debug, Default)]
struct Node {
    /// By the [`hash`] of what follows, where that is no pattern: numbers are compared sooner than names that begin alike.
    literal: BTreeMap<u64, Vec<(Box<str>, Node)>>,
    /// By what follows, where it is one.
    patterns: Vec<(Box<str>, Node)>,
    /// After `**`.
    deep: Option<Box<Node>>,
    /// One ends here.
    ends: bool,
}

impl Globs {
    /// Reads the globs.
    ///
    /// # Errors
    /// The first that is none.
    pub fn new<T: AsRef<str>>(globs: impl IntoIterator<Item = T>) -> Result<Self, GlobError> {
        let mut set = Self::default();
        for (index, glob) in globs.into_iter().enumerate() {
            set.insert(glob.as_ref()).map_err(|message| GlobError { index, message: message.into() })?;
        }
        Ok(set)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none; nothing matches then.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether one of them matches the whole of `name`.
    pub fn matches(&self, name: &str) -> bool {
        !self.is_empty() && self.root.matches(Some(name))
    }

    fn insert(&mut self, glob: &str) -> Result<(), &'static str> {
        if glob.is_empty() || glob.len() > LONGEST {
            return Err("a glob has 1 to 512 bytes");
        }
        if glob.split('/').filter(|segment| *segment == "**").count() > DEEP {
            return Err("more than three `**`");
        }
        let mut node = &mut self.root;
        for segment in glob.split('/') {
            node = match segment {
                "" => return Err("an empty segment: two slashes, or one at an end"),
                "**" => node.deep.get_or_insert_default(),
                _ if segment.contains("**") => return Err("`**` stands for whole segments: `a/**/b`"),
                _ if segment.contains(['[', ']', '{', '}', '\\', '!']) => {
                    return Err("only `*`, `**` and `?` have a meaning here");
                }
                _ if segment.contains(['*', '?']) => below(&mut node.patterns, segment),
                _ => below(node.literal.entry(hash(segment)).or_default(), segment),
            };
        }
        node.ends = true;
        self.count += 1;
        Ok(())
    }
}

impl Node {
    /// `name`: what is left of it; none: nothing, which is not the same as an empty segment.
    fn matches(&self, name: Option<&str>) -> bool {
        let Some(deep) = &self.deep else { return self.matches_here(name) };
        let mut left = name;
        loop {
            if deep.matches(left) {
                return true;
            }
            let Some(skipped) = left else { return self.matches_here(name) };
            left = split(skipped).1;
        }
    }

    /// Without `**`.
    fn matches_here(&self, name: Option<&str>) -> bool {
        let Some(name) = name else { return self.ends };
        let (first, rest) = split(name);
        let literal = self.literal.get(&hash(first)).into_iter().flatten();
        literal.filter(|(segment, _)| **segment == *first).any(|(_, node)| node.matches(rest))
            || self
                .patterns
                .iter()
                .any(|(pattern, node)| is_match(pattern.as_bytes(), first.as_bytes()) && node.matches(rest))
    }
}

/// The node below `segment`, made where there is none.
fn below<'a>(nodes: &'a mut Vec<(Box<str>, Node)>, segment: &str) -> &'a mut Node {
    let at = nodes.iter().position(|(known, _)| **known == *segment).unwrap_or_else(|| {
        nodes.reserve_exact(1);
        nodes.push((segment.into(), Node::default()));
        nodes.len() - 1
    });
    &mut nodes[at].1
}

/// The first segment, and what follows it.
fn split(name: &str) -> (&str, Option<&str>) {
    name.split_once('/').map_or((name, None), |(first, rest)| (first, Some(rest)))
}

/// FNV-1a. Whoever asks cannot make the operator's globs collide.
fn hash(segment: &str) -> u64 {
    segment
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Whether a pattern with `*` and `?` matches a segment. A `*` that was passed is taken up again where the rest fails, so
/// the time is at most the product of both lengths.
fn is_match(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut place) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(letter) if *letter == b'?' || *letter == text[place] => {
                at += 1;
                place += 1;
            }
            _ => match &mut star {
                Some((star_at, from)) => {
                    *from += 1;
                    (at, place) = (*star_at + 1, *from);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|letter| *letter == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_those_of_the_host() {
        for (glob, yes, no) in [
            (
                "docker.io/library/*",
                vec!["docker.io/library/nginx"],
                vec!["docker.io/library", "docker.io/library/a/b"],
            ),
            ("docker.io/**", vec!["docker.io/a", "docker.io/a/b"], vec!["docker.io.evil/a", "quay.io/a"]),
            ("**/nginx", vec!["docker.io/library/nginx", "nginx"], vec!["docker.io/nginx-x"]),
            ("a/**/z", vec!["a/z", "a/b/z", "a/b/c/z"], vec!["a/b", "z"]),
            ("*.corp.test/team-?/**", vec!["r.corp.test/team-1/x"], vec!["r.corp.test/team-12/x"]),
            ("r/*a*b", vec!["r/ab", "r/xaxxb", "r/aab"], vec!["r/aba", "r/ba"]),
            ("registry:5000/x", vec!["registry:5000/x"], vec!["registry/x"]),
        ] {
            let globs = Globs::new([glob]).unwrap();
            for name in yes {
                assert!(globs.matches(name), "{glob} {name}");
            }
            for name in no {
                assert!(!globs.matches(name), "{glob} {name}");
            }
        }
    }

    #[test]
    fn what_is_no_glob_is_named() {
        for glob in ["", "a//b", "/a", "a/b**", "a/{b,c}", "a/[b]", "**/**/**/**"] {
            let error = Globs::new(["ok", glob]).unwrap_err();
            assert_eq!(error.index, 1, "{glob}: {}", error.message);
        }
    }

    #[test]
    fn many_globs_are_one_set() {
        let globs = Globs::new((0..1000).map(|team| format!("docker.io/team-{team}/*"))).unwrap();
        assert_eq!(globs.len(), 1000);
        assert!(globs.matches("docker.io/team-999/app") && !globs.matches("docker.io/team-1000/app"));
        assert!(Globs::default().is_empty() && !Globs::default().matches("a"));
    }
}
