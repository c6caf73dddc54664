//! Several changes at once: all are made or none.

use crate::bitmap::{
    BlockDirtyBitmapAdd, BlockDirtyBitmapDisable, BlockDirtyBitmapEnable, BlockDirtyBitmapMerge,
    BlockDirtyBitmapRemove,
};
use crate::command::{Nothing, commands};
use serde::Serialize;

/// Carries out all actions or none.
#[derive(Clone, Debug, Serialize)]
pub struct Transaction {
    /// In this order.
    pub actions: Vec<Action>,
}

/// One change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum Action {
    /// See [`BlockDirtyBitmapAdd`].
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
    /// See [`BlockDirtyBitmapRemove`].
    BlockDirtyBitmapRemove(BlockDirtyBitmapRemove),
    /// See [`BlockDirtyBitmapEnable`].
    BlockDirtyBitmapEnable(BlockDirtyBitmapEnable),
    /// See [`BlockDirtyBitmapDisable`].
    BlockDirtyBitmapDisable(BlockDirtyBitmapDisable),
    /// See [`BlockDirtyBitmapMerge`].
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
}

commands! {
    Transaction => "transaction" -> Nothing;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_written_as_qemu_reads_them() {
        let action = Action::BlockDirtyBitmapAdd(BlockDirtyBitmapAdd {
            node: "disk".into(),
            name: "b1".into(),
            granularity: Some(4096),
            persistent: Some(true),
            disabled: None,
        });
        assert_eq!(
            serde_json::to_string(&Transaction { actions: vec![action] }).unwrap(),
            r#"{"actions":[{"type":"block-dirty-bitmap-add","data":{"node":"disk","name":"b1","granularity":4096,"persistent":true}}]}"#
        );
    }
}
