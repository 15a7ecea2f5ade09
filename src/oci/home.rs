//! Which node does something for all nodes: the question that `mirror` asks and `election` answers.

use super::PeerId;

/// Who does it for a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Home {
    /// This node.
    Here,
    /// That one, as far as is known here; it may see it otherwise.
    Peer(PeerId),
    /// Nobody: each node for itself.
    #[default]
    Nobody,
}

/// Answers for each key; implemented by `election`, wired by `app`. Must be a read of a table: it is called on hot paths and must
/// not block. Two nodes may answer differently for as long as they see different members.
pub trait Homes: Send + Sync {
    /// The home of `key`, any bytes.
    fn home(&self, key: &[u8]) -> Home;

    /// Who does it where the home does not answer.
    fn runner_up(&self, key: &[u8]) -> Home {
        let _ = key;
        Home::Nobody
    }
}

/// The twin in memory: each function of a key.
impl<F: Fn(&[u8]) -> Home + Send + Sync> Homes for F {
    fn home(&self, key: &[u8]) -> Home {
        self(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_a_twin() {
        let homes: &dyn Homes = &|key: &[u8]| if key.starts_with(b"a") { Home::Here } else { Home::Nobody };
        assert_eq!((homes.home(b"ab"), homes.home(b"b")), (Home::Here, Home::Nobody));
    }
}
