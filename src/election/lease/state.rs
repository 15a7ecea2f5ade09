//! What a candidate keeps: the object as it was seen, its term, and the request that is under way.

use std::sync::Arc;

use super::{Ms, Object, RequestId, Token};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    /// `None`: there is no object.
    pub(super) object: Option<Object>,
    /// When the time of its holder began to count.
    pub(super) since: Ms,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Term {
    pub(super) token: Token,
    pub(super) until: Ms,
    pub(super) renew_at: Ms,
    /// As it was last sent.
    pub(super) duration: Ms,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Flight {
    pub(super) id: RequestId,
    pub(super) what: What,
    pub(super) sent: Ms,
    pub(super) deadline: Ms,
    /// When it left.
    pub(super) news: u64,
    pub(super) version: u64,
    pub(super) uid: Arc<str>,
    pub(super) sequence: u64,
    pub(super) duration: Ms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    Read,
    Create,
    Acquire,
    Renew,
    Release,
}
