//! What each command does: one file per command, on a `Txn` (see `txn.rs`).
//!
//! Namespace: [`create`], [`link`], [`unlink`], [`rename`], [`set_attr`], [`xattr`], with [`dir`], [`trash`], [`privileges`] and [`posix_acl`] for what
//! they share.
//! Data: [`commit`], [`fallocate`], [`copy_range`], [`relocate`], [`erase`], [`reap`], with [`extents`] and [`segments`] for what they share.
//! The rest: [`batch`], [`volume`], [`session`], [`remove_tree`]; [`quota`], with [`charge`] for what other commands have to do with quotas.

pub(crate) mod batch;
pub(crate) mod charge;
pub(crate) mod commit;
pub(crate) mod copy_range;
pub(crate) mod create;
pub(crate) mod dir;
pub(crate) mod erase;
pub(crate) mod extents;
pub(crate) mod fallocate;
pub(crate) mod link;
pub(crate) mod posix_acl;
pub(crate) mod privileges;
pub(crate) mod quota;
mod quota_depth;
pub(crate) mod reap;
pub(crate) mod relocate;
pub(crate) mod remove_tree;
pub(crate) mod rename;
pub(crate) mod segments;
pub(crate) mod session;
pub(crate) mod set_attr;
pub(crate) mod trash;
pub(crate) mod unlink;
pub(crate) mod volume;
pub(crate) mod xattr;
