//! Unlogged tables: a copy has them empty, which those who start it should know. Each database must be asked by
//! itself, so this belongs into prepare and is bounded.

use super::Order;
use super::wire::{Trouble, connect_to, row, rows};
use crate::quiesce::channel::Note;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};
use tokio_postgres::Client;

/// Most databases that are asked.
const DATABASES_MAX: usize = 64;
/// Most tables that are named for one database.
const NAMES_MAX: usize = 8;
/// Longest time for one database.
const DATABASE_TIME: Duration = Duration::from_secs(2);
/// Longest time for all of them.
const ALL_TIME: Duration = Duration::from_secs(20);
/// What is left to the phase at the end.
const MARGIN: Duration = Duration::from_secs(1);

/// What is unlogged in each database, and which databases could not be asked.
///
/// Ends well before `until`: this knowledge is not worth the phase.
pub(super) async fn look(
    client: &Client,
    order: &Order,
    socket: RawFd,
    role: &str,
    until: Instant,
) -> Vec<Note> {
    let until = until.checked_sub(MARGIN).unwrap_or(until).min(Instant::now() + ALL_TIME);
    let statement =
        "SELECT datname FROM pg_database WHERE datallowconn AND datname <> 'template0' ORDER BY 1";
    let databases = match rows(client, statement).await {
        Ok(databases) => databases.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect(),
        Err(trouble) => return vec![unseen("(all)", &trouble)],
    };
    let databases: Vec<String> = databases;
    let mut notes = Vec::new();
    for (number, database) in databases.iter().enumerate() {
        if number == DATABASES_MAX || Instant::now() >= until {
            let left = databases.len() - number;
            notes.push(Note::new("unlogged_unseen", format!("{left} more databases were not asked")));
            break;
        }
        let limit = until.min(Instant::now() + DATABASE_TIME);
        let asked = tokio::time::timeout_at(limit.into(), ask(order, socket, role, database)).await;
        match asked.unwrap_or(Err(Trouble::Cancelled)) {
            Ok(None) => {}
            Ok(Some(message)) => notes.push(Note::new("unlogged_tables", message)),
            Err(trouble) => notes.push(unseen(database, &trouble)),
        }
    }
    notes
}

async fn ask(order: &Order, socket: RawFd, role: &str, database: &str) -> Result<Option<String>, Trouble> {
    let client = connect_to(order, socket, role, database).await?;
    let statement = format!(
        "SELECT count(*), string_agg(name, ', ') FILTER (WHERE number <= {NAMES_MAX}) FROM \
            (SELECT oid::regclass::text AS name, row_number() OVER (ORDER BY oid) AS number FROM pg_class \
            WHERE relpersistence = 'u' AND relkind = 'r') AS unlogged"
    );
    let answer = row(&client, &statement).await?;
    let [count, names] = answer.as_slice() else { return Ok(None) };
    Ok((count != "0").then(|| format!("{count} in database {database} are empty in a copy: {names}")))
}

fn unseen(database: &str, trouble: &Trouble) -> Note {
    Note::new("unlogged_unseen", format!("database {database} could not be asked: {trouble}"))
}
