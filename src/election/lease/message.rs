//! What a candidate is told, and what it says: nothing else passes between it and its driver.

use std::sync::Arc;

use super::{Mark, Ms, Object, RequestId, Role, Settings};

/// What comes in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// It is time.
    Tick,
    /// The answer to a request.
    Answer(RequestId, Answer),
    /// A watch says that the object is so now.
    Seen(Object),
    /// A watch says that the object was deleted, and its version then.
    Gone(u64),
    /// Something may have been missed: a watch ended, or the API server can be reached again.
    Reread,
    /// The part of this node in the election.
    Ranked(Standing),
    /// Other times.
    Configured(Settings),
    /// The work of the term that ended has ended.
    Joined,
    /// Give the lease away, for a while or (`true`) for good.
    Leave(bool),
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Success, with the object as it is now.
    Object(Object),
    /// There is no such object.
    Absent,
    /// The object is not as the request said, or there is one already.
    Conflict,
    /// Nothing was written, and nothing will be. The server asks for a pause, where it says one.
    Rejected(Option<Ms>),
    /// Nobody knows: no answer, a broken connection, an error of the server. It may even be carried out later.
    Unknown,
}

/// The part of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// May lead. 0 is tried first.
    Candidate(u32),
    /// Only reads, about once in so many milliseconds.
    Observer(Ms),
}

/// What goes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Applied before what comes after it.
    Role(Role),
    /// To be sent. Whatever was sent before and is not answered yet may be given up.
    Send(RequestId, Request),
}

/// A request to the API server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// GET, without a resourceVersion: the newest.
    Get,
    /// POST: an object without a holder.
    Create(Write),
    /// PUT.
    Put(Write),
}

/// A record to be written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    /// Of the object that is replaced; empty in a POST.
    pub uid: Arc<str>,
    /// Of the object that is replaced; 0 in a POST.
    pub version: u64,
    /// Empty: nobody.
    pub holder: Arc<str>,
    /// For `leaseDurationSeconds`, rounded up.
    pub duration: Ms,
    /// For `leaseTransitions`.
    pub transitions: u32,
    /// For the annotation.
    pub mark: Mark,
    /// A term begins: for `acquireTime`.
    pub begins: bool,
}
