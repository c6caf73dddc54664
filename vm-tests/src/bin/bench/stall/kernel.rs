//! Where FIFREEZE spends its time, by the guest kernel's own function tracer.

use vm_tests::Guest;

const TRACING: &str = "/sys/kernel/tracing";
/// What is timed, in FIFREEZE and below. Those that a kernel does not have are left out.
const FUNCTIONS: &[&str] = &[
    "freeze_super",
    // Waits until those who write or touch pages have left the file system; new ones wait outside from here on.
    "percpu_down_write",
    "sync_filesystem",
    "writeback_inodes_sb",
    "sync_inodes_sb",
    "xfs_fs_sync_fs",
    "ext4_sync_fs",
    "sync_blockdev",
    "xfs_fs_freeze",
    "xfs_log_force",
    "xfs_ail_push_all_sync",
    "xfs_buftarg_wait",
    "xfs_log_cover",
    "ext4_freeze",
    "jbd2_journal_lock_updates",
    "jbd2_journal_flush",
];

/// Begins to time FIFREEZE in the guest. Answers whether its kernel can.
pub(super) fn begin(guest: &Guest) -> bool {
    let functions = FUNCTIONS.join(" ");
    let script = format!(
        "busybox mount -t tracefs tracefs {TRACING}; cd {TRACING} && for f in {functions}; do echo $f >>set_ftrace_filter; \
         done; echo freeze_super >set_graph_function && echo function_graph >current_tracer && \
         echo funcgraph-proc >trace_options && echo funcgraph-tail >trace_options && echo nofuncgraph-cpu >trace_options && \
         echo 1 >tracing_on"
    );
    guest.exec(&script).code == 0
}

/// What was timed since the last call: a line for each FIFREEZE, its parts in the order in which they ended.
pub(super) fn take(guest: &Guest) -> Vec<String> {
    let text = guest.exec(&format!("cat {TRACING}/trace; echo >{TRACING}/trace")).out;
    freezes(&text)
}

/// From the tracer's text: `TASK | DURATION us | name();` or `} /* name */` at the end of each function.
fn freezes(text: &str) -> Vec<String> {
    let mut open: Vec<(&str, Vec<String>)> = Vec::new();
    let mut freezes = Vec::new();
    for line in text.lines() {
        let parts: Vec<&str> = line.splitn(3, '|').map(str::trim).collect();
        let &[task, duration, call] = &parts[..] else { continue };
        let number = duration.trim_start_matches(|c: char| !c.is_ascii_digit()).trim_end_matches(" us");
        let Ok(us) = number.trim().parse::<f64>() else { continue };
        let name = call.trim_start_matches("} /* ").trim_end_matches(" */").trim_end_matches("();");
        let at = open.iter().position(|(one, _)| *one == task).unwrap_or_else(|| {
            open.push((task, Vec::new()));
            open.len() - 1
        });
        let part = format!("{name} {:.1}", us / 1000.0);
        if name == "freeze_super" {
            freezes.push(format!("{part} = {}", std::mem::take(&mut open[at].1).join(", ")));
        } else {
            open[at].1.push(part);
        }
    }
    freezes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_freeze_has_its_parts_although_two_run_at_once() {
        let text = "\
# tracer: function_graph
#
# TASK/PID         DURATION                  FUNCTION CALLS
# |    |            |   |                     |   |   |   |
    fs-0-812    |               |  freeze_super() {
    fs-0-812    |   3.500 us    |    percpu_down_write();
    fs-1-813    |               |  freeze_super() {
    fs-0-812    |               |    xfs_fs_freeze() {
    fs-1-813    | # 1500.000 us |    ext4_freeze();
    fs-0-812    | @ 120000.0 us |    } /* xfs_fs_freeze */
    fs-1-813    | # 1600.000 us |  } /* freeze_super */
    fs-0-812    | @ 120100.0 us |  } /* freeze_super */
";
        assert_eq!(
            freezes(text),
            [
                "freeze_super 1.6 = ext4_freeze 1.5",
                "freeze_super 120.1 = percpu_down_write 0.0, xfs_fs_freeze 120.0"
            ]
        );
    }
}
