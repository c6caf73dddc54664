//! A view of the machine's own files with others laid over them, which ends with the processes that have it.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;

/// `sh -c PRELUDE view WORK SCRIPT ROOT…`, then the script with `$work`. The first process of a pid namespace becomes the
/// parent of all that are left alone there, so it is a shell, which takes notice of their end.
const PRELUDE: &str = r#"
set -e
work=$1 script=$2
shift 2
mount -t tmpfs -o mode=755 view "$work"
for folder in usr etc var; do
    mkdir -p "$work/$folder" "$work/$folder-work"
    below=/$folder
    for root in "$@"; do
        [ ! -d "$root/$folder" ] || below=$root/$folder:$below
        # Packages of before the merge of /lib into /usr.
        [ "$folder" != usr ] || [ ! -d "$root/lib" ] || libraries=$root/lib:$libraries
    done
    mount -t overlay -o "lowerdir=$below,upperdir=$work/$folder,workdir=$work/$folder-work" view "/$folder"
done
[ -z "$libraries" ] || mount -t overlay -o "lowerdir=$libraries/usr/lib" view /usr/lib
mount -t tmpfs -o mode=755 view /run
eval "$script"
"#;

/// Whether there can be such a view; if not, it is said that the test which asks is skipped.
#[must_use]
pub fn is_possible() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        // A standard error that is gone is read by nobody.
        let _told = writeln!(
            io::stderr(),
            "SKIPPED: only root can lay files over the machine's in a view of its own"
        );
    }
    is_root
}

/// A shell script in such a view: `roots` (unpacked packages) lie over `/usr`, `/etc` and `/var`, all of which may be
/// written to, `/run` is empty, and there is neither a network nor another process. `work` is an empty folder.
///
/// What the script starts ends with the process of this command. Only root can have it.
#[must_use]
pub fn in_view(script: &str, work: &Path, roots: &[&Path]) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation=private", "sh", "-c", PRELUDE, "view"])
        .arg(work)
        .arg(script)
        .args(roots);
    command
}
