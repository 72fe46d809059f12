//! Being written.
use crate::{
    txn::{OpResult, Txn},
    view::View,
};
use heliofs_proto::{error::FsError, v1};
pub(crate) fn set<V: View>(_txn: &mut Txn<V>, _op: &v1::SetXattr) -> OpResult {
    Err(FsError::NotSupported.into())
}
pub(crate) fn remove<V: View>(_txn: &mut Txn<V>, _op: &v1::RemoveXattr) -> OpResult {
    Err(FsError::NotSupported.into())
}
