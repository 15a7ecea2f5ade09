//! The view of a store in memory: names, blobs and their repositories, and who is told of changes.
//!
//! Adapters make a [`Snapshot`] of what they hold and give it to [`View::replace`], which finds the differences. All
//! reads are reads of a map.

/// The shared view.
#[derive(Debug, Default)]
pub struct View {}
/// One image record.
#[derive(Debug, Default)]
pub struct Image {}
/// What a store holds at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {}
