//! Being written.
use crate::{
    txn::{OpResult, Txn},
    view::View,
};
use heliofs_proto::{error::FsError, v1};
pub(crate) fn fallocate<V: View>(_txn: &mut Txn<V>, _op: &v1::Fallocate) -> OpResult {
    Err(FsError::NotSupported.into())
}
