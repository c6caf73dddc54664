//! Reads `/proc/PID/mountinfo`. Pure: text in, mounts out.
//!
//! Source: `proc_pid_mountinfo(5)`; Linux `fs/proc_namespace.c`, `show_mountinfo`.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most bytes read of one table: 65,536 mounts (the kernel's `fs.mount-max` is 100,000) of 256 bytes.
pub const TABLE_BYTES_MAX: usize = 16 << 20;
/// Most mounts kept of one table.
pub const MOUNTS_MAX: usize = 65_536;

/// The number of a device or, for file systems without one, of a superblock (major 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// Kind of device; 0 for anonymous ones.
    pub major: u32,
    /// Which of its kind.
    pub minor: u32,
}

impl DeviceNumber {
    /// From the kernel's combined number, as in `st_dev`.
    pub fn from_raw(device: u64) -> Self {
        Self { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
    }

    /// Major and minor in one word, for tables of numbers.
    pub fn packed(self) -> u64 {
        u64::from(self.major) << 32 | u64::from(self.minor)
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(Self { major: major.parse().map_err(|_| ())?, minor: minor.parse().map_err(|_| ())? })
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Unique among all mounts of the kernel while it exists.
    pub id: u64,
    /// The mount that it is mounted on.
    pub parent: u64,
    /// Number of the superblock.
    pub device: DeviceNumber,
    /// Which folder of the file system is seen here.
    pub root: PathBuf,
    /// Where, relative to the reader's root.
    pub mountpoint: PathBuf,
    /// File system type, e.g. `ext4` or `fuse.sshfs`.
    pub kind: String,
    /// What was mounted, e.g. `/dev/vda1`.
    pub source: String,
    /// The superblock is read-only, whatever this mount says.
    pub read_only: bool,
    /// Of an overlay: the folder that takes what is written, as whoever mounted it saw it.
    pub upper: Option<PathBuf>,
}

/// A table that breaks its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Longer than `TABLE_BYTES_MAX` or `MOUNTS_MAX`.
    #[error("the mount table is longer than {MOUNTS_MAX} mounts or {TABLE_BYTES_MAX} bytes")]
    TooLong,
    /// A line that no kernel writes: better no freeze than one of half the file systems.
    #[error("line {0} of the mount table cannot be understood")]
    Line(usize),
}

/// Reads a whole table, in the kernel's order.
/// # Errors
/// `TableError`; a line that cannot be read fails the whole, because a file system must not go missing in silence.
pub fn parse(table: &[u8]) -> Result<Vec<Mount>, TableError> {
    if table.len() > TABLE_BYTES_MAX {
        return Err(TableError::TooLong);
    }
    let mut mounts = Vec::new();
    for (at, line) in table.split(|byte| *byte == b'\n').enumerate() {
        if line.is_empty() {
            continue;
        }
        if mounts.len() == MOUNTS_MAX {
            return Err(TableError::TooLong);
        }
        mounts.push(mount(line).ok_or(TableError::Line(at + 1))?);
    }
    Ok(mounts)
}

fn mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let root = path(fields.next()?);
    let mountpoint = path(fields.next()?);
    let _options = fields.next()?;
    // Optional fields, none or several, end at a lone hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let kind = text(fields.next()?);
    // A source may be an empty string; then two spaces follow one another, which `split` gives as an empty field.
    let source = text(fields.next()?);
    let super_options = fields.next().unwrap_or_default();
    let mut options = super_options.split(|byte| *byte == b',');
    let read_only = options.clone().any(|option| option == b"ro");
    let upper = options.find_map(|option| option.strip_prefix(b"upperdir="));
    let upper = upper.filter(|_| kind == "overlay").map(path);
    Some(Mount { id, parent, device, root, mountpoint, kind, source, read_only, upper })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(decode(field)))
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&decode(field)).into_owned()
}

/// Undoes the kernel's `mangle`: space, tab, newline, backslash and `#` come as a backslash and three octal digits.
pub fn decode(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        match octal(&field[at..]) {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(field[at]);
                at += 1;
            }
        }
    }
    plain
}

fn octal(bytes: &[u8]) -> Option<u8> {
    let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] = bytes else { return None };
    Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
}

/// The mount that a path is seen through: the longest mount point that is a prefix; the last of equals lies on top.
pub fn covering<'m>(mounts: &'m [Mount], path: &Path) -> Option<&'m Mount> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.mountpoint))
        .max_by_key(|mount| mount.mountpoint.as_os_str().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Mount {
        parse(line.as_bytes()).unwrap().remove(0)
    }

    #[test]
    fn reads_a_line_with_optional_fields() {
        let mount =
            one("36 35 98:0 /sub /mnt/a rw,noatime shared:1 master:2 - ext3 /dev/root ro,errors=continue\n");
        assert_eq!(mount.id, 36);
        assert_eq!(mount.device.to_string(), "98:0");
        assert_eq!(mount.root, Path::new("/sub"));
        assert_eq!(mount.kind, "ext3");
        assert_eq!(mount.source, "/dev/root");
        assert!(mount.read_only);
    }

    #[test]
    fn decodes_spaces_tabs_newlines_and_backslashes_in_names() {
        let mount = one(r"1 0 8:1 / /a\040b\011c\012d\134e\043 rw - ext4 /dev/disk/by-label/x\040y rw");
        assert_eq!(mount.mountpoint, Path::new("/a b\tc\nd\\e#"));
        assert_eq!(mount.source, "/dev/disk/by-label/x y");
    }

    #[test]
    fn a_backslash_without_three_octal_digits_stays() {
        assert_eq!(decode(br"\9\04\777"), br"\9\04\777");
    }

    #[test]
    fn a_mount_made_read_only_over_a_writable_superblock_is_writable() {
        assert!(!one("1 0 8:1 / /a ro - ext4 /dev/sda1 rw").read_only);
    }

    #[test]
    fn an_empty_source_is_an_empty_string() {
        assert_eq!(one("1 0 0:5 / /a rw - tmpfs  rw").source, "");
    }

    #[test]
    fn a_damaged_line_fails_the_whole_table() {
        assert_eq!(
            parse(b"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:x / /a rw - ext4 /dev/b rw\n"),
            Err(TableError::Line(2))
        );
        assert_eq!(parse(b"1 0 8:1 / / rw ext4 /dev/a rw\n"), Err(TableError::Line(1)));
    }

    #[test]
    fn a_table_beyond_its_limit_is_refused() {
        let line = "1 0 8:1 / / rw - ext4 /dev/a rw\n";
        assert_eq!(parse(line.repeat(MOUNTS_MAX + 1).as_bytes()), Err(TableError::TooLong));
        assert_eq!(parse(&vec![b'\n'; TABLE_BYTES_MAX + 1]), Err(TableError::TooLong));
    }

    #[test]
    fn the_last_of_two_mounts_on_one_place_covers_it() {
        let table = "1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /a rw - ext4 b rw\n3 2 8:3 / /a rw - ext4 c rw\n";
        let mounts = parse(table.as_bytes()).unwrap();
        assert_eq!(covering(&mounts, Path::new("/a/x")).unwrap().id, 3);
        assert_eq!(covering(&mounts, Path::new("/ab")).unwrap().id, 1);
    }

    #[test]
    fn an_overlay_names_its_upper_folder() {
        let overlay =
            "31 30 0:44 / /c rw shared:1 - overlay overlay rw,lowerdir=/l,upperdir=/u\\040x/diff,workdir=/w";
        assert_eq!(one(overlay).upper.as_deref(), Some(Path::new("/u x/diff")));
        assert_eq!(one(&overlay.replace("- overlay", "- ext4")).upper, None);
    }
}
