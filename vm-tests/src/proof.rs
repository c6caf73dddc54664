//! The proof: what was acknowledged before a snapshot's point, compared with what a twin of it holds.

use crate::acks::Acks;
use crate::commands::{
    CHECK_FILE_SYSTEMS, DATA_RECORDS, RECOVERY_LOG, ROOT_RECORDS, amcheck, count_records, psql,
};
use crate::stillpoint::{Stillpoint, Twin};
use serde_json::Value;
use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a twin may take until its agent answers, and its PostgreSQL. Emulated, on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long one check in a twin may take.
const CHECK_LIMIT: Duration = Duration::from_secs(300);

/// The highest numbers that were acknowledged before an instant; the load counts without gaps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promised {
    /// Rows committed.
    pub commits: u64,
    /// Records written to ext4, never synced.
    pub ext4: u64,
    /// Records written to xfs, never synced.
    pub xfs: u64,
}

impl Promised {
    /// What the host had read before an instant of its wall clock, in milliseconds since 1970.
    pub fn before(acks: &Acks, ms: u64) -> Self {
        let now = Instant::now();
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        // An acknowledgement is read after it was sent, so this errs towards promising less.
        let early = |at: Instant| now_ms.saturating_sub((now - at).as_millis()) < u128::from(ms);
        let mut promised = Self::default();
        for ack in acks.so_far().iter().filter(|ack| early(ack.at)) {
            let highest = match ack.kind {
                'c' => &mut promised.commits,
                'w' => &mut promised.ext4,
                'x' => &mut promised.xfs,
                _ => continue,
            };
            *highest = ack.number.max(*highest);
        }
        promised
    }

    /// What a snapshot has to contain: everything before its freeze was sent, or before its cut if it did not freeze.
    ///
    /// # Errors
    /// If the receipt cannot be shown.
    pub fn of(stillpoint: &Stillpoint, acks: &Acks, snapshot: &str) -> Result<Self, String> {
        let shown = stillpoint.run(&["show", snapshot])?.success()?;
        let receipt = &shown["receipt"];
        let sent = receipt["order"]["freeze_sent_ms"].as_u64().or(receipt["point"]["at_ms"].as_u64());
        Ok(Self::before(acks, sent.ok_or("the receipt names no point")?))
    }
}

impl fmt::Display for Promised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commits, {} writes to ext4, {} writes to xfs", self.commits, self.ext4, self.xfs)
    }
}

/// What a twin holds of what was promised, and what its checks say.
#[derive(Clone, Debug)]
pub struct Found {
    /// Of those promised.
    pub kept: Promised,
    /// Until the agent answered.
    pub agent_after: Duration,
    /// Until PostgreSQL answered queries.
    pub postgresql_after: Duration,
    /// PostgreSQL's own lines about its recovery.
    pub recovery: String,
    /// What `pg_amcheck` or the file-system checks complained about; empty if nothing.
    pub complaints: Vec<String>,
}

impl Found {
    /// What is missing of what was promised.
    pub fn missing(&self, promised: &Promised) -> Promised {
        Promised {
            commits: promised.commits.saturating_sub(self.kept.commits),
            ext4: promised.ext4.saturating_sub(self.kept.ext4),
            xfs: promised.xfs.saturating_sub(self.kept.xfs),
        }
    }
}

/// Boots a twin of a snapshot, lets it recover, and looks.
///
/// # Errors
/// If the twin does not come so far that it can be asked.
pub fn prove(stillpoint: &Stillpoint, snapshot: &str, promised: &Promised) -> Result<Found, String> {
    let mut twin = stillpoint.boot(snapshot, BOOT_LIMIT)?;
    let agent_after = twin.age();
    twin.wait_for(&psql("bench", "select 1"), BOOT_LIMIT).map_err(|error| {
        format!(
            "PostgreSQL in the twin does not answer: {error}\n{}",
            twin.exec("tail -n 20 /var/log/postgresql/*.log", CHECK_LIMIT).unwrap_or_default()
        )
    })?;
    let postgresql_after = twin.age();
    let recovery = twin.exec(RECOVERY_LOG, CHECK_LIMIT)?;
    let rows = format!("select count(*) from commits where number <= {}", promised.commits);
    let kept = Promised {
        commits: number(&mut twin, &psql("bench", &rows))?,
        ext4: number(&mut twin, &count_records(ROOT_RECORDS))?,
        xfs: number(&mut twin, &count_records(DATA_RECORDS))?,
    };
    let mut complaints = Vec::new();
    // The file systems last: that check stops PostgreSQL and leaves the root read-only.
    for check in [amcheck("bench"), CHECK_FILE_SYSTEMS.to_owned()] {
        complaints.extend(twin.exec(&check, CHECK_LIMIT).err());
    }
    Ok(Found { kept, agent_after, postgresql_after, recovery, complaints })
}

fn number(twin: &mut Twin, command: &str) -> Result<u64, String> {
    let text = twin.exec(command, CHECK_LIMIT)?;
    text.trim().parse().map_err(|_| format!("{command} printed {text:?}"))
}

/// The id in the object that `snapshot` ends with.
///
/// # Errors
/// If it is not there.
pub fn snapshot_id(object: &Value) -> Result<&str, String> {
    object["snapshot"].as_str().ok_or_else(|| format!("no snapshot in {object}"))
}
