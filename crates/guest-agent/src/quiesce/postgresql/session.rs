//! A worker's session with one server, the same from prepare to resume.

use super::wire::{Trouble, connect_as_any, row};
use super::{Order, evidence, unlogged};
use crate::quiesce::channel::{Answer, Note, Phase};
use crate::quiesce::worker::Session;
use std::future::{Future, pending, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Runtime;
use tokio_postgres::Client;

/// The oldest server whose functions are all known. Source: PostgreSQL's release notes.
const VERSION_NUM_MIN: u32 = 110_000;
/// Since then an idle session may be ended by a setting.
const IDLE_TIMEOUT_VERSION_NUM: u32 = 140_000;
/// Since then a transaction as a whole may be ended by a setting, a CHECKPOINT too.
const TRANSACTION_TIMEOUT_VERSION_NUM: u32 = 170_000;
/// A server that lets nobody in for so long stands still, or is as good as that: the whole time of prepare, which is
/// meant for checkpoints, would be waited for nothing.
const LET_IN_MAX: Duration = Duration::from_secs(15);

/// Makes a session that will connect when it is first asked to do something.
/// # Errors
/// When the order is not understood or no runtime can be made.
pub(super) fn open(order: serde_json::Value, socket: RawFd) -> io::Result<Box<dyn Session>> {
    let order = serde_json::from_value(order)?;
    // One thread, run only while a phase waits: in between it does nothing at all.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(Box::new(Postgres { runtime, server: Server { order, socket, held: None } }))
}

struct Postgres {
    runtime: Runtime,
    server: Server,
}

impl Session for Postgres {
    fn phase(&mut self, phase: Phase, until: Instant) -> Answer {
        let server = &mut self.server;
        let timeout_code = match phase {
            Phase::Rehearse => "rehearse_timeout",
            Phase::Prepare => "prepare_timeout",
            Phase::Quiesce => "quiesce_timeout",
            Phase::Resume => "post_check_failed",
        };
        let done = self.runtime.block_on(async {
            let work = async {
                match phase {
                    Phase::Rehearse => server.rehearse().await,
                    Phase::Prepare => server.prepare(until).await,
                    Phase::Quiesce => server.quiesce(until).await,
                    Phase::Resume => server.resume().await,
                }
            };
            let mut work = pin!(tokio::time::timeout_at(until.into(), work));
            let mut gone = pin!(agent_gone());
            poll_fn(|context| match gone.as_mut().poll(context) {
                // A server may keep a statement waiting for long, and nobody is left who would want its answer.
                Poll::Ready(()) => Poll::Ready(Ok(Err(Trouble::Closed))),
                Poll::Pending => work.as_mut().poll(context),
            })
            .await
        });
        match done {
            Ok(Ok(answer)) => answer,
            Ok(Err(trouble)) => Answer::failed(trouble.code(timeout_code), trouble.to_string()),
            Err(_) => Answer::failed(timeout_code, "the server did not answer in time"),
        }
    }
}

/// Ends when the agent is gone: while a phase lasts it sends nothing, so its channel has only its end to tell.
async fn agent_gone() {
    // SAFETY: descriptor 0 is the channel, which a worker keeps open until its end.
    let watched = unsafe { AsyncFd::register_with_interest(io::stdin().as_raw_fd(), Interest::READABLE) };
    // A channel that cannot be watched is looked at again when the phase is over.
    let Ok(watched) = watched else { return pending().await };
    if watched.readable().await.is_err() {
        pending().await
    }
}

struct Server {
    order: Order,
    socket: RawFd,
    held: Option<Held>,
}

/// A live connection, and what must be the same after the thaw.
struct Held {
    client: Client,
    role: String,
    backend_pid: String,
    started: String,
}

impl Server {
    async fn rehearse(&mut self) -> Result<Answer, Trouble> {
        let held = match self.connected().await? {
            Ok(held) => held,
            Err(unsupported) => return Ok(unsupported),
        };
        let mut answer = evidence::read(&held.client).await?;
        if !held.may_checkpoint().await? {
            let message = format!("role {} may not CHECKPOINT: it lacks pg_checkpoint", held.role);
            return Ok(Answer { failure: Some(Note::new("not_permitted", message)), ..answer });
        }
        // A rehearsal promises no position.
        answer.position = None;
        Ok(answer)
    }

    async fn prepare(&mut self, until: Instant) -> Result<Answer, Trouble> {
        let (order_for_databases, socket) = (self.order.clone(), self.socket);
        let held = match self.connected().await? {
            Ok(held) => held,
            Err(unsupported) => return Ok(unsupported),
        };
        let mut answer = Answer::default();
        match held.checkpoint(until).await {
            Ok(took) => {
                drop(answer.facts.insert("prepare_checkpoint_ms".to_owned(), took.as_millis().to_string()))
            }
            // The second one may still make it: a checkpoint that was given up goes on in the server.
            Err(trouble @ Trouble::Cancelled) => {
                answer.notes.push(Note::new("prepare_timeout", format!("first CHECKPOINT: {trouble}")));
            }
            Err(trouble) => return Err(trouble),
        }
        answer
            .notes
            .extend(unlogged::look(&held.client, &order_for_databases, socket, &held.role, until).await);
        answer.facts.insert("role".to_owned(), held.role.clone());
        Ok(answer)
    }

    async fn quiesce(&mut self, until: Instant) -> Result<Answer, Trouble> {
        let held = match self.connected().await? {
            Ok(held) => held,
            Err(unsupported) => return Ok(unsupported),
        };
        let took = held.checkpoint(until).await?;
        let mut answer = evidence::read(&held.client).await?;
        answer.facts.insert("quiesce_checkpoint_ms".to_owned(), took.as_millis().to_string());
        answer.facts.insert("session_pid".to_owned(), held.backend_pid.clone());
        answer.facts.insert("server_started".to_owned(), held.started.clone());
        Ok(answer)
    }

    /// The same backend of the same server still answers on the same connection.
    async fn resume(&mut self) -> Result<Answer, Trouble> {
        // Taken out: whatever comes of it, the session ends with this phase.
        let held = self.held.take().ok_or(Trouble::Closed)?;
        let (backend_pid, started) = held.identity().await?;
        if (&backend_pid, &started) != (&held.backend_pid, &held.started) {
            let message = format!("session {backend_pid} of a server started {started} answered");
            return Ok(Answer::failed("post_check_failed", message));
        }
        Ok(Answer::default())
    }

    /// The session, made if there is none yet. The inner error is an answer: a server too old to be understood.
    async fn connected(&mut self) -> Result<Result<&Held, Answer>, Trouble> {
        if self.held.is_none() {
            let entering = tokio::time::timeout(LET_IN_MAX, connect_as_any(&self.order, self.socket));
            let (client, role) = entering.await.map_err(|_| Trouble::Silent(LET_IN_MAX.as_secs()))??;
            let version = row(&client, "SELECT current_setting('server_version_num')").await?.remove(0);
            let number: u32 = version.parse().unwrap_or(0);
            if number < VERSION_NUM_MIN {
                let message = format!("server version {version} is older than any that is known");
                return Ok(Err(Answer::failed("unsupported_version", message)));
            }
            if number >= IDLE_TIMEOUT_VERSION_NUM {
                client.simple_query("SET idle_session_timeout = 0").await?;
                // A worker that dies in a statement leaves a session that notices only when it answers. Systems where
                // the server cannot look refuse this; then it is that statement's own time limit that ends it.
                let _watched =
                    client.simple_query("SET client_connection_check_interval = 1000").await.is_ok();
            }
            if number >= TRANSACTION_TIMEOUT_VERSION_NUM {
                client.simple_query("SET transaction_timeout = 0").await?;
            }
            let mut held = Held { client, role, backend_pid: String::new(), started: String::new() };
            (held.backend_pid, held.started) = held.identity().await?;
            self.held = Some(held);
        }
        Ok(self.held.as_ref().ok_or_else(|| Answer::failed("session_lost", "no session")))
    }
}

impl Held {
    /// Has the server write out everything, within the time of the phase: who asks knows how big the server is. Tells how long it
    /// took.
    async fn checkpoint(&self, until: Instant) -> Result<Duration, Trouble> {
        let begin = Instant::now();
        let left = until.saturating_duration_since(begin);
        // Less than is left, so that the server gives up before we do, and the session stays usable.
        let limit = (left - left / 10).as_millis().max(1);
        self.client.simple_query(&format!("SET statement_timeout = {limit}")).await?;
        self.client.simple_query("CHECKPOINT").await?;
        self.client.simple_query("SET statement_timeout = '10s'").await?;
        Ok(begin.elapsed())
    }

    /// Source: `CHECKPOINT` in PostgreSQL's reference; the role `pg_checkpoint` came with 15.
    async fn may_checkpoint(&self) -> Result<bool, Trouble> {
        let statement = "SELECT bool_or(pg_has_role(oid, 'USAGE')) OR current_setting('is_superuser') = 'on' \
            FROM pg_roles WHERE rolname = 'pg_checkpoint'";
        Ok(row(&self.client, statement).await?.first().is_some_and(|may| may == "t"))
    }

    async fn identity(&self) -> Result<(String, String), Trouble> {
        let statement = "SELECT pg_backend_pid(), extract(epoch FROM pg_postmaster_start_time())::text";
        let mut values = row(&self.client, statement).await?.into_iter();
        Ok((values.next().unwrap_or_default(), values.next().unwrap_or_default()))
    }
}
