//! Being written.
use crate::{
    txn::{OpResult, Txn},
    view::View,
};
use heliofs_proto::{error::FsError, v1};
pub(crate) fn allocate<V: View>(_txn: &mut Txn<V>, _op: &v1::SegmentsAllocate) -> OpResult {
    Err(FsError::NotSupported.into())
}
