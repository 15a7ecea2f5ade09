//! The program from a shell: its commands, what they print and their exit codes.

use crate::Case;

pub(crate) fn cases() -> Vec<Case> {
    Vec::new()
}
