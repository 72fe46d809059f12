//! Being written.
use crate::{
    txn::{OpResult, Txn},
    view::View,
};
use heliofs_proto::{error::FsError, v1};
pub(crate) fn begin<V: View>(_txn: &mut Txn<V>, _op: &v1::RemoveTree) -> OpResult {
    Err(FsError::NotSupported.into())
}
pub(crate) fn step<V: View>(_txn: &mut Txn<V>, _op: &v1::RemoveTreeStep) -> OpResult {
    Err(FsError::NotSupported.into())
}
