//! What a server says about itself: how far its log reached, and which of its settings a copy's safety rests on.

use super::wire::{Trouble, row, rows};
use crate::quiesce::channel::{Answer, Note};
use tokio_postgres::Client;

/// Most rows of one kind that are listed; the rest is counted.
const ROWS_MAX: usize = 32;
/// Spellings of a setting that is off. Source: `synchronous_commit_options` in PostgreSQL's `guc_tables.c`.
const OFF: [&str; 4] = ["off", "false", "no", "0"];

/// Reads everything into an answer: facts, notes, version, position, and whether the server is crash-safe.
/// # Errors
/// When the server refuses what every role may read, or the connection ends.
pub(super) async fn read(client: &Client) -> Result<Answer, Trouble> {
    let mut answer = Answer::default();
    settings(client, &mut answer).await?;
    control(client, &mut answer).await?;
    positions(client, &mut answer).await?;
    contents(client, &mut answer).await?;
    let durable = commits_are_durable(client, &mut answer).await?;
    let on = |name: &str| answer.facts.get(name).is_some_and(|value| value == "on");
    answer.crash_safe = on("fsync") && on("full_page_writes") && durable;
    for (name, harm) in [
        ("fsync", "a power failure at the point may leave the copy unreadable"),
        ("full_page_writes", "a power failure at the point may leave torn pages"),
    ] {
        if !on(name) {
            answer.notes.push(Note::new("not_crash_safe", format!("{name} is off: {harm}")));
        }
    }
    Ok(answer)
}

async fn settings(client: &Client, answer: &mut Answer) -> Result<(), Trouble> {
    const NAMES: [&str; 8] = [
        "server_version",
        "server_version_num",
        "fsync",
        "full_page_writes",
        "synchronous_commit",
        "synchronous_standby_names",
        "wal_level",
        "archive_mode",
    ];
    let columns = NAMES.map(|name| format!("current_setting('{name}')")).join(", ");
    let values = row(client, &format!("SELECT {columns}, pg_is_in_recovery()::text")).await?;
    for (name, value) in NAMES.iter().chain(&["in_recovery"]).zip(values) {
        answer.facts.insert((*name).to_owned(), value);
    }
    // Distributions put their own words behind the number.
    let version = answer.facts.get("server_version").and_then(|version| version.split_whitespace().next());
    answer.version = version.map(str::to_owned);
    // Readable by superusers and `pg_read_all_settings` only; the agent knows the directory anyhow.
    if let Ok(directory) = row(client, "SELECT current_setting('data_directory')").await {
        answer.facts.extend(directory.into_iter().map(|path| ("data_directory".to_owned(), path)));
    }
    Ok(())
}

async fn control(client: &Client, answer: &mut Answer) -> Result<(), Trouble> {
    const NAMES: [&str; 4] = ["system_identifier", "checkpoint_lsn", "redo_lsn", "timeline"];
    let statement = "SELECT system_identifier, checkpoint_lsn, redo_lsn, timeline_id \
        FROM pg_control_system(), pg_control_checkpoint()";
    match row(client, statement).await {
        Ok(values) => {
            answer.facts.extend(NAMES.iter().zip(values).map(|(name, value)| ((*name).to_owned(), value)));
            Ok(())
        }
        Err(Trouble::NotPermitted(words)) => {
            answer.notes.push(Note::new("control_unseen", words));
            Ok(())
        }
        Err(trouble) => Err(trouble),
    }
}

/// The position is how far the log is on disk: everything committed up to there is in the copy.
async fn positions(client: &Client, answer: &mut Answer) -> Result<(), Trouble> {
    let standby = answer.facts.get("in_recovery").is_some_and(|value| value == "true");
    let (names, statement) = if standby {
        // Without streaming nothing was received; then what was replayed is what is known to be there.
        (
            ["flush_lsn", "receive_lsn", "replay_lsn"],
            "SELECT coalesce(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0'), \
                pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()",
        )
    } else {
        (
            ["flush_lsn", "insert_lsn", "write_lsn"],
            "SELECT pg_current_wal_flush_lsn(), pg_current_wal_insert_lsn(), pg_current_wal_lsn()",
        )
    };
    let values = row(client, statement).await?;
    answer.position = values.first().cloned();
    answer.facts.extend(names.iter().zip(values).map(|(name, value)| ((*name).to_owned(), value)));
    Ok(())
}

async fn contents(client: &Client, answer: &mut Answer) -> Result<(), Trouble> {
    let prepared = row(client, "SELECT count(*) FROM pg_prepared_xacts").await?.remove(0);
    if prepared != "0" {
        let message = format!("{prepared} in doubt: in a copy they hold their locks until someone decides");
        answer.notes.push(Note::new("prepared_transactions", message));
    }
    answer.facts.insert("prepared_transactions".to_owned(), prepared);
    let statement = format!(
        "SELECT spcname, pg_tablespace_location(oid) FROM pg_tablespace \
            WHERE pg_tablespace_location(oid) <> '' ORDER BY 1 LIMIT {}",
        ROWS_MAX + 1
    );
    let places = rows(client, &statement).await?;
    let list = places.iter().take(ROWS_MAX).map(|place| {
        let column = |number: usize| place.get(number).and_then(Option::as_deref).unwrap_or_default();
        format!("{}={}", column(0), column(1))
    });
    let mut list: Vec<String> = list.collect();
    if places.len() > ROWS_MAX {
        list.push("…".to_owned());
    }
    answer.facts.insert("tablespaces".to_owned(), list.join(" "));
    Ok(())
}

/// Is every commit on disk before it is acknowledged, as far as this can be read? What single sessions set for
/// themselves cannot be.
async fn commits_are_durable(client: &Client, answer: &mut Answer) -> Result<bool, Trouble> {
    let unseen = "what a session sets for itself (synchronous_commit) cannot be seen from outside";
    answer.notes.push(Note::new("session_settings_unseen", unseen));
    let mut durable = true;
    let statement = "SELECT setting, source FROM pg_settings WHERE name = 'synchronous_commit'";
    let setting = row(client, statement).await?;
    if setting.iter().any(|value| is_off(value)) {
        durable = false;
        answer.notes.push(Note::new("asynchronous_commit", "synchronous_commit is off in the server"));
    }
    if setting.get(1).is_some_and(|source| source.contains("user") || source == "database") {
        // Our own role or database overrides it, so that the server's own value is hidden behind.
        durable = false;
        let message = "synchronous_commit of the server is hidden behind an override for our own role";
        answer.notes.push(Note::new("settings_unreadable", message));
    }
    let statement = format!(
        "SELECT coalesce(datname, '(any)'), coalesce(rolname, '(any)'), split_part(entry, '=', 2) \
            FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS entry \
            LEFT JOIN pg_database d ON d.oid = setdatabase LEFT JOIN pg_roles r ON r.oid = setrole \
            WHERE lower(split_part(entry, '=', 1)) = 'synchronous_commit' ORDER BY 1, 2 LIMIT {}",
        ROWS_MAX + 1
    );
    let overrides = match rows(client, &statement).await {
        Ok(overrides) => overrides,
        Err(Trouble::NotPermitted(words)) => {
            answer.notes.push(Note::new("settings_unreadable", words));
            return Ok(false);
        }
        Err(trouble) => return Err(trouble),
    };
    if overrides.len() > ROWS_MAX {
        durable = false;
        let message = format!("more than {ROWS_MAX} overrides of synchronous_commit");
        answer.notes.push(Note::new("settings_unreadable", message));
    }
    let mut list = Vec::new();
    for one in overrides.iter().take(ROWS_MAX) {
        let column = |number: usize| one.get(number).and_then(Option::as_deref).unwrap_or_default();
        let (database, role, value) = (column(0), column(1), column(2));
        if is_off(value) {
            durable = false;
            let message = format!("synchronous_commit is off for role {role} in database {database}");
            answer.notes.push(Note::new("asynchronous_commit", message));
        }
        list.push(format!("{role}@{database}={value}"));
    }
    answer.facts.insert("synchronous_commit_overrides".to_owned(), list.join(" "));
    Ok(durable)
}

fn is_off(value: &str) -> bool {
    OFF.contains(&value.to_ascii_lowercase().as_str())
}
