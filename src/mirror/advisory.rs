//! Denials that do not bind: the runtime has another host for the registry, and goes there. Which registries these are is found
//! out when something is denied, and told in log and status.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::oci::Registry;

/// Registries that are remembered. Requests name them.
const REGISTRIES: usize = 64;
/// How long what was found out about a registry counts.
const AGAIN: Duration = Duration::from_secs(10);
/// How long a denial is told.
const TOLD: Duration = Duration::from_secs(3600);

/// What was denied, by registry.
#[derive(Debug, Default)]
pub(super) struct Advisory(Mutex<BTreeMap<Registry, Denied>>);

#[derive(Debug)]
struct Denied {
    policy: String,
    count: u64,
    last: Instant,
    asked: Instant,
    is_open: Option<bool>,
}

impl Advisory {
    /// Notes a denial; tells whether it is to be found out if the registry is open.
    pub(super) fn denied(&self, registry: &Registry, policy: &str, now: Instant) -> bool {
        let mut denied = self.lock();
        if let Some(entry) = denied.get_mut(registry) {
            entry.count += 1;
            entry.last = now;
            if entry.policy != policy {
                policy.clone_into(&mut entry.policy);
            }
            let is_due = now.duration_since(entry.asked) >= AGAIN;
            entry.asked = if is_due { now } else { entry.asked };
            return is_due;
        }
        if denied.len() >= REGISTRIES {
            denied.retain(|_, entry| now.duration_since(entry.last) < AGAIN);
        }
        if denied.len() >= REGISTRIES {
            return false;
        }
        let entry = Denied { policy: policy.to_owned(), count: 1, last: now, asked: now, is_open: None };
        denied.insert(registry.clone(), entry);
        true
    }

    /// What was found out.
    pub(super) fn found(&self, registry: &Registry, is_open: bool) {
        let mut denied = self.lock();
        let Some(entry) = denied.get_mut(registry) else { return };
        if entry.is_open.replace(is_open) != Some(is_open) && is_open {
            tracing::warn!("{}", entry.told(registry));
        }
    }

    /// Denials of the last hour that were advice, one line each.
    pub(super) fn told(&self, now: Instant) -> Vec<String> {
        let denied = self.lock();
        let open = denied
            .iter()
            .filter(|(_, entry)| entry.is_open == Some(true) && now.duration_since(entry.last) < TOLD);
        open.map(|(registry, entry)| entry.told(registry)).collect()
    }

    /// Whether the runtime is known to have another host for it.
    pub(super) fn is_open(&self, registry: &Registry) -> bool {
        self.lock().get(registry).is_some_and(|entry| entry.is_open == Some(true))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Registry, Denied>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Denied {
    fn told(&self, registry: &Registry) -> String {
        format!(
            "the policy `{}` denies images of {registry}, which is advice only ({} requests): the runtime has another host for \
             it; `peili configure {registry} --mode only` (`runtime.configureMode` of the chart) closes it",
            self.policy, self.count
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_registries_are_told_for_an_hour() {
        let (advisory, now) = (Advisory::default(), Instant::now());
        let (open, closed): (Registry, Registry) =
            ("open.test".parse().unwrap(), "closed.test".parse().unwrap());
        assert!(advisory.denied(&open, "allow-list", now) && advisory.denied(&closed, "allow-list", now));
        assert!(!advisory.denied(&open, "allow-list", now), "it is being found out");
        advisory.found(&open, true);
        advisory.found(&closed, false);
        let told = advisory.told(now);
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("open.test") && told[0].contains("(2 requests)"), "{told:?}");
        assert!(advisory.denied(&open, "allow-list", now + AGAIN), "it may have been closed since");
        assert!(advisory.told(now + AGAIN + TOLD).is_empty());
        for number in 0..2 * REGISTRIES {
            advisory.denied(&format!("r{number}.test").parse().unwrap(), "allow-list", now);
        }
        assert!(advisory.lock().len() <= REGISTRIES);
    }
}
