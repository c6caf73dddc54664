//! QEMU's own NBD server and what it exports.

use crate::command::{Nothing, commands};
use serde::{Deserialize, Serialize};

/// Starts the NBD server; a QEMU has at most one.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NbdServerStart {
    /// Where it listens.
    pub addr: SocketAddress,
    /// Most connections at once; the rest wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
}

/// Ends the NBD server and every export on it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NbdServerStop {}

/// Where a server listens. Unix sockets only: NBD without TLS does not leave the machine.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
pub enum SocketAddress {
    /// A unix socket.
    Unix {
        /// Absolute path, at most 107 bytes.
        path: String,
    },
}

/// Exports a node over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportAdd {
    /// Always `nbd`.
    #[serde(rename = "type")]
    pub kind: ExportKind,
    /// Id of the export.
    pub id: String,
    /// What to export.
    pub node_name: String,
    /// Name that NBD clients ask for.
    pub name: String,
    /// Whether clients may write to it and discard.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub writable: bool,
    /// Bitmaps to show as meta contexts `qemu:dirty-bitmap:NAME`; they may belong to other nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapReference>,
}

/// The kind of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// NBD.
    Nbd,
}

/// A bitmap of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapReference {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// Ends an export. It is gone when `BLOCK_EXPORT_DELETED` arrives.
#[derive(Clone, Debug, Serialize)]
pub struct BlockExportDel {
    /// Its id.
    pub id: String,
    /// `Hard` also ends connections.
    pub mode: RemoveMode,
}

/// How to end an export.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemoveMode {
    /// Refused while clients are connected.
    Safe,
    /// Clients are cut off.
    Hard,
}

/// Asks for every export.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryBlockExports {}

/// One export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Export {
    /// Its id.
    #[serde(default)]
    pub id: String,
    /// What it exports.
    #[serde(default)]
    pub node_name: String,
    /// `nbd`, `fuse` …
    #[serde(rename = "type", default)]
    pub kind: String,
    /// It is being ended.
    #[serde(default)]
    pub shutting_down: bool,
}

commands! {
    NbdServerStart => "nbd-server-start" -> Nothing;
    NbdServerStop => "nbd-server-stop" -> Nothing;
    BlockExportAdd => "block-export-add" -> Nothing;
    BlockExportDel => "block-export-del" -> Nothing;
    QueryBlockExports => "query-block-exports" -> Vec<Export>;
}
