//! Dirty bitmaps: which blocks the guest wrote since the bitmap began.

use crate::command::{Nothing, commands};
use crate::export::BitmapReference;
use serde::{Deserialize, Serialize};

/// Adds a bitmap to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapAdd {
    /// The node.
    pub node: String,
    /// Its name there.
    pub name: String,
    /// Bytes per bit, a power of two of at least 512.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u32>,
    /// Stored in the image when QEMU ends; qcow2 of version 3 only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// Does not record yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
}

macro_rules! on_one_bitmap {
    ($($(#[$doc:meta])* $type:ident => $name:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize)]
        pub struct $type {
            /// The node.
            pub node: String,
            /// The bitmap.
            pub name: String,
        }
        commands! { $type => $name -> Nothing; }
    )*};
}
on_one_bitmap! {
    /// Removes a bitmap, from the image too.
    BlockDirtyBitmapRemove => "block-dirty-bitmap-remove";
    /// Lets a bitmap record.
    BlockDirtyBitmapEnable => "block-dirty-bitmap-enable";
    /// Ends a bitmap's recording; what it holds stays.
    BlockDirtyBitmapDisable => "block-dirty-bitmap-disable";
    /// Forgets what a bitmap holds.
    BlockDirtyBitmapClear => "block-dirty-bitmap-clear";
}

/// Adds what some bitmaps hold to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapMerge {
    /// The node of the bitmap that receives.
    pub node: String,
    /// The bitmap that receives.
    pub target: String,
    /// Those that are added.
    pub bitmaps: Vec<BitmapReference>,
}

/// A bitmap as QEMU reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Bitmap {
    /// Absent on bitmaps that a job made for itself.
    #[serde(default)]
    pub name: Option<String>,
    /// Bytes that it holds as dirty.
    #[serde(default)]
    pub count: u64,
    /// Bytes per bit.
    #[serde(default)]
    pub granularity: u64,
    /// Guest writes are recorded.
    #[serde(default)]
    pub recording: bool,
    /// Held by an operation; cannot be changed now.
    #[serde(default)]
    pub busy: bool,
    /// Stored in the image when QEMU ends.
    #[serde(default)]
    pub persistent: bool,
    /// Found in the image but not closed properly; can only be removed.
    #[serde(default)]
    pub inconsistent: bool,
}

commands! {
    BlockDirtyBitmapAdd => "block-dirty-bitmap-add" -> Nothing;
    BlockDirtyBitmapMerge => "block-dirty-bitmap-merge" -> Nothing;
}
