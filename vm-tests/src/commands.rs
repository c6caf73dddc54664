//! Shell commands for the inside of a guest, or of a twin of it.

/// The never-synced records on the root's ext4 (acknowledged as `w`).
pub const ROOT_RECORDS: &str = "/var/tmp/records";
/// The never-synced records on the data disk's xfs (acknowledged as `x`).
pub const DATA_RECORDS: &str = "/var/lib/postgresql/records";
/// Checks both file systems, changing nothing, after their logs were recovered by mounting; exit code 0 if they are well.
/// Stops PostgreSQL and leaves the root read-only, so it comes last.
pub const CHECK_FILE_SYSTEMS: &str = "/usr/lib/stillpoint-guest/check-file-systems";
/// What PostgreSQL logged about its last start: whether it had to recover, and how long its redo took.
pub const RECOVERY_LOG: &str = "busybox grep -E 'was (interrupted|shut down)|redo (starts|done|is not)|ready to accept' \
                                /var/log/postgresql/postgresql-15-main.log | busybox tail -n 4";
pub(crate) const AS_POSTGRES: &str = "/usr/bin/setpriv --reuid=postgres --regid=postgres --init-groups";

/// One SQL statement: unaligned, without headers; fails if the statement does.
#[must_use]
pub fn psql(database: &str, statement: &str) -> String {
    let quoted = statement.replace('\'', r"'\''");
    format!(
        "cd / && {AS_POSTGRES} /usr/lib/postgresql/15/bin/psql --no-psqlrc -qAt -v ON_ERROR_STOP=1 -d {database} -c '{quoted}'"
    )
}

/// `pg_amcheck` over one database, every heap row against its indexes; prints nothing and exits with 0 if all is well.
#[must_use]
pub fn amcheck(database: &str) -> String {
    format!(
        "cd / && {AS_POSTGRES} /usr/lib/postgresql/15/bin/pg_amcheck --heapallindexed --database={database}"
    )
}

/// Prints how many records a file of the never-synced writer holds, from the first without a gap; 0 if there is no file.
#[must_use]
pub fn count_records(file: &str) -> String {
    format!("if [ -e {file} ]; then /run/stillpoint/load --count {file}; else echo 0; fi")
}
