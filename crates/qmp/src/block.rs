//! Block devices, nodes and images.

use crate::bitmap::Bitmap;
use crate::command::{Nothing, commands};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Asks for what the guest's disk devices have inserted.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryBlock {}

/// Asks for every named node of the block graph.
#[derive(Clone, Debug, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Without each node's whole backing chain.
    pub flat: bool,
}

/// A guest's disk device, or a drive without device.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Device {
    /// Drive id of `-drive`, or empty.
    #[serde(default)]
    pub device: String,
    /// Id or object path of the device; absent if the drive is in none.
    #[serde(default)]
    pub qdev: Option<String>,
    /// Its medium can be changed: CD-ROM, floppy.
    #[serde(default)]
    pub removable: bool,
    /// What is inserted; absent: the drive is empty.
    #[serde(default)]
    pub inserted: Option<Node>,
}

/// A node of the block graph.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Node {
    /// Its name; `#block123` if QEMU chose it.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Its driver: `raw`, `qcow2`, `file`, a filter …
    #[serde(default)]
    pub drv: String,
    /// The file name as QEMU shows it.
    #[serde(default)]
    pub file: String,
    /// It cannot be written.
    #[serde(default)]
    pub ro: bool,
    /// What QEMU knows of the image.
    #[serde(default)]
    pub image: Image,
    /// The bitmaps on it.
    #[serde(default)]
    pub dirty_bitmaps: Vec<Bitmap>,
}

/// An image.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// File name as opened; a JSON description for composed ones.
    #[serde(default)]
    pub filename: String,
    /// Format as opened (this is no probe: QEMU was told).
    #[serde(default)]
    pub format: String,
    /// Size that the guest sees, in bytes.
    #[serde(default)]
    pub virtual_size: u64,
    /// Facts of the format; for qcow2 `data.compat` is `0.10` (version 2) or `1.1` (version 3).
    #[serde(default)]
    pub format_specific: Value,
    /// The image that it lies on, with all that lies below.
    #[serde(default)]
    pub backing_image: Option<Box<Image>>,
}

impl Image {
    /// A qcow2 of version 3, which can keep bitmaps.
    pub fn keeps_bitmaps(&self) -> bool {
        self.format == "qcow2"
            && self.format_specific["data"]["compat"].as_str().is_some_and(|compat| compat != "0.10")
    }
}

/// Opens a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum BlockdevAdd {
    /// A file on the host.
    #[serde(rename_all = "kebab-case")]
    File {
        /// Name of the new node, at most 31 bytes.
        node_name: String,
        /// Absolute path.
        filename: String,
        /// How writes reach it.
        #[serde(skip_serializing_if = "Option::is_none")]
        cache: Option<Cache>,
    },
    /// A qcow2 image.
    #[serde(rename_all = "kebab-case")]
    Qcow2 {
        /// Name of the new node.
        node_name: String,
        /// The node that holds the image's bytes.
        file: String,
        /// How writes reach it.
        #[serde(skip_serializing_if = "Option::is_none")]
        cache: Option<Cache>,
    },
    /// The filter that copies old data to `target` before the guest overwrites it.
    #[serde(rename_all = "kebab-case")]
    CopyBeforeWrite {
        /// Name of the new node.
        node_name: String,
        /// The guest's disk.
        file: String,
        /// The scratch image.
        target: String,
        /// What to do when the copy fails.
        #[serde(skip_serializing_if = "Option::is_none")]
        on_cbw_error: Option<OnCbwError>,
        /// Longest time that a guest's write waits for the copy, in seconds; 0: for ever.
        #[serde(skip_serializing_if = "Option::is_none")]
        cbw_timeout: Option<u32>,
    },
    /// What the disk held when the filter was put in place.
    #[serde(rename_all = "kebab-case")]
    SnapshotAccess {
        /// Name of the new node.
        node_name: String,
        /// The `copy-before-write` node.
        file: String,
        /// What becomes of discards; absent: nothing.
        #[serde(skip_serializing_if = "Option::is_none")]
        discard: Option<Discard>,
    },
    /// What lies below, as it is.
    #[serde(rename_all = "kebab-case")]
    Raw {
        /// Name of the new node.
        node_name: String,
        /// The node below, made with it.
        file: Box<BlockdevAdd>,
    },
    /// No data.
    #[serde(rename_all = "kebab-case")]
    NullCo {
        /// Name of the new node.
        node_name: String,
        /// Size in bytes.
        size: u64,
        /// Reads give zeroes.
        read_zeroes: bool,
    },
}

/// What a node does about discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Discard {
    /// It carries them out.
    Unmap,
}

/// Opens an image with everything that it lies on, read-only. Nothing is taken from a header: each layer is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum OpenImage {
    /// A file or device whose bytes are the disk's.
    #[serde(rename_all = "kebab-case")]
    Raw {
        /// Name of the new node; absent on those below the first.
        #[serde(skip_serializing_if = "Option::is_none")]
        node_name: Option<String>,
        /// Always true.
        read_only: bool,
        /// What holds its bytes.
        file: OpenFile,
    },
    /// A qcow2 image.
    #[serde(rename_all = "kebab-case")]
    Qcow2 {
        /// Name of the new node; absent on those below the first.
        #[serde(skip_serializing_if = "Option::is_none")]
        node_name: Option<String>,
        /// Always true.
        read_only: bool,
        /// What holds its bytes.
        file: OpenFile,
        /// What it lies on; `null` says that it lies on nothing, whatever its header says.
        backing: Option<Box<OpenImage>>,
    },
}

/// What holds an image's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "driver", rename_all = "snake_case")]
pub enum OpenFile {
    /// A plain file.
    #[serde(rename_all = "kebab-case")]
    File {
        /// Absolute path.
        filename: String,
        /// Always true.
        read_only: bool,
        /// Whether QEMU's locks are taken, so that another QEMU could not open it for writing.
        locking: Locking,
    },
    /// A block device.
    #[serde(rename_all = "kebab-case")]
    HostDevice {
        /// Absolute path.
        filename: String,
        /// Always true.
        read_only: bool,
        /// As for a file.
        locking: Locking,
    },
}

/// Whether QEMU's locks are taken on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Locking {
    /// They are.
    On,
    /// They are not.
    Off,
}

/// What a `copy-before-write` filter does when its copy fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCbwError {
    /// The guest's write fails.
    BreakGuestWrite,
    /// The guest's write succeeds, every later read of the snapshot fails.
    BreakSnapshot,
}

/// How writes reach an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cache {
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes do nothing: for data that need not survive the host.
    pub no_flush: bool,
}

/// Closes a node that nothing uses.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    /// Its name.
    pub node_name: String,
}

/// Writes an empty image into an open node, as a job.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevCreate {
    /// Id of the job; it has to be dismissed.
    pub job_id: String,
    /// What to create.
    pub options: CreateOptions,
}

/// What to create.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum CreateOptions {
    /// A qcow2 image.
    Qcow2 {
        /// The node that will hold the image's bytes.
        file: String,
        /// Virtual size in bytes, a multiple of 512.
        size: u64,
    },
}

commands! {
    QueryBlock => "query-block" -> Vec<Device>;
    QueryNamedBlockNodes => "query-named-block-nodes" -> Vec<Node>;
    BlockdevAdd => "blockdev-add" -> Nothing;
    OpenImage => "blockdev-add" -> Nothing;
    BlockdevDel => "blockdev-del" -> Nothing;
    BlockdevCreate => "blockdev-create" -> Nothing;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_written_as_qemu_reads_it() {
        let add = BlockdevAdd::CopyBeforeWrite {
            node_name: "c".into(),
            file: "d".into(),
            target: "s".into(),
            on_cbw_error: Some(OnCbwError::BreakSnapshot),
            cbw_timeout: Some(10),
        };
        assert_eq!(
            serde_json::to_string(&add).unwrap(),
            r#"{"driver":"copy-before-write","node-name":"c","file":"d","target":"s","on-cbw-error":"break-snapshot","cbw-timeout":10}"#
        );
    }

    #[test]
    fn an_image_at_the_bottom_says_that_it_lies_on_nothing() {
        let file = |filename: &str| OpenFile::File {
            filename: filename.into(),
            read_only: true,
            locking: Locking::Off,
        };
        let below = OpenImage::Qcow2 { node_name: None, read_only: true, file: file("/b"), backing: None };
        let top = OpenImage::Qcow2 {
            node_name: Some("d0".into()),
            read_only: true,
            file: file("/a"),
            backing: Some(Box::new(below)),
        };
        assert_eq!(
            serde_json::to_string(&top).unwrap(),
            r#"{"driver":"qcow2","node-name":"d0","read-only":true,"file":{"driver":"file","filename":"/a","read-only":true,"locking":"off"},"backing":{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"/b","read-only":true,"locking":"off"},"backing":null}}"#
        );
    }

    #[test]
    fn only_qcow2_of_version_3_keeps_bitmaps() {
        let image = |format: &str, compat: &str| Image {
            format: format.into(),
            format_specific: serde_json::json!({"type": format, "data": {"compat": compat}}),
            ..Image::default()
        };
        assert!(image("qcow2", "1.1").keeps_bitmaps());
        assert!(!image("qcow2", "0.10").keeps_bitmaps());
        assert!(!image("raw", "1.1").keeps_bitmaps());
        assert!(!Image::default().keeps_bitmaps());
    }
}
