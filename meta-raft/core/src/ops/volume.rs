//! Being written.
use crate::{
    txn::{OpResult, Txn},
    view::View,
};
use heliofs_proto::{error::FsError, v1};
pub(crate) fn init<V: View>(_txn: &mut Txn<V>, _op: &v1::VolumeInit) -> OpResult {
    Err(FsError::NotSupported.into())
}
pub(crate) fn update_settings<V: View>(_txn: &mut Txn<V>, _op: &v1::SettingsUpdate) -> OpResult {
    Err(FsError::NotSupported.into())
}
