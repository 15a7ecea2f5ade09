//! Registries that answer or not, as a test says.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;

use super::Upstream;
use crate::oci::Registry;

/// Answers from a table; registries that are not in it do not answer.
#[derive(Debug, Default)]
pub struct Memory {
    answers: Mutex<HashMap<Registry, bool>>,
}

impl Memory {
    /// From now on `registry` answers, or does not.
    pub fn set(&self, registry: &Registry, answers: bool) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(registry.clone(), answers);
    }
}

#[async_trait]
impl Upstream for Memory {
    async fn answers(&self, registry: &Registry) -> bool {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(registry).copied().unwrap_or(false)
    }
}
