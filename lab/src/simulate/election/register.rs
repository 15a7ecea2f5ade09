//! The object at the API server: what a Lease does there, the surprising parts too.

use std::sync::Arc;

use peili::election::lease::{Answer, Object, Record, Request, Write};

/// What changed, as a watch tells it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Change {
    Now(Object),
    Gone(u64),
}

/// One object by one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Register {
    pub(super) object: Option<Object>,
    pub(super) version: u64,
    objects: u64,
    /// The writes by which somebody became holder: version and holder.
    pub(super) begun: Vec<(u64, Arc<str>)>,
}

impl Register {
    /// Carries a request out. A write without uid and version is a merge patch.
    pub(super) fn handle(&mut self, request: &Request) -> (Answer, Option<Change>) {
        match request {
            Request::Get => match &self.object {
                Some(object) => (Answer::Object(object.clone()), None),
                None => (Answer::Absent, None),
            },
            Request::Create(_) if self.object.is_some() => (Answer::Conflict, None),
            Request::Create(write) => self.store(None, write),
            Request::Put(write) => match &self.object {
                // A PUT creates, also with an old version; only a uid in its body keeps it from that.
                None if write.uid.is_empty() => self.store(None, write),
                None => (Answer::Conflict, None),
                Some(object) if !write.uid.is_empty() && write.uid != object.uid => (Answer::Conflict, None),
                Some(object) if write.version != 0 && write.version != object.version => {
                    (Answer::Conflict, None)
                }
                Some(object) => {
                    let object = object.clone();
                    self.store(Some(object), write)
                }
            },
        }
    }

    fn store(&mut self, before: Option<Object>, write: &Write) -> (Answer, Option<Change>) {
        let record = Record {
            holder: write.holder.clone(),
            // Whole seconds.
            duration: write.duration.div_ceil(1_000) * 1_000,
            renewed: None,
            transitions: write.transitions,
            preferred: false,
            mark: Some(write.mark.clone()),
        };
        // A write that changes nothing is none, and answered with success.
        if let Some(before) = before.as_ref().filter(|before| before.record == record) {
            return (Answer::Object(before.clone()), None);
        }
        self.version += 1;
        if write.begins {
            self.begun.push((self.version, write.holder.clone()));
        }
        let uid = before.map_or_else(|| self.uid(), |before| before.uid);
        let object = Object { uid, version: self.version, record };
        self.object = Some(object.clone());
        (Answer::Object(object.clone()), Some(Change::Now(object)))
    }

    fn uid(&mut self) -> Arc<str> {
        self.objects += 1;
        format!("uid-{}", self.objects).into()
    }

    /// By an operator.
    pub(super) fn delete(&mut self) -> Option<Change> {
        self.object.take()?;
        self.version += 1;
        Some(Change::Gone(self.version))
    }

    /// By an operator: an object that says nothing.
    pub(super) fn create(&mut self) -> Option<Change> {
        if self.object.is_some() {
            return None;
        }
        self.version += 1;
        let object = Object { uid: self.uid(), version: self.version, record: Record::default() };
        self.object = Some(object.clone());
        Some(Change::Now(object))
    }

    /// By an operator or a tool.
    pub(super) fn edit(&mut self, edit: impl FnOnce(&mut Record)) -> Option<Change> {
        let object = self.object.as_mut()?;
        edit(&mut object.record);
        self.version += 1;
        object.version = self.version;
        Some(Change::Now(object.clone()))
    }
}
