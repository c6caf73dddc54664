//! The guest's side of a run: who answers, and freeze and thaw with whoever it is.

use crate::register::VmEntry;
use crate::watch::Cancel;
use guest_protocol::stillpoint::{CheckArguments, CheckReport, FreezeArguments, ThawArguments, Want};
use qmp::machine::QueryStatus;
use snapshot::conduct::Ended;
use snapshot::receipt::{self, Receipt, StockFilesystem, StockFreeze};
use snapshot::{Level, Reason, Request};
use std::time::Duration;
use vm::agent::{Agent, AgentError, Kind, Line, Socket};
use vm::monitor::Monitor;

/// How long an agent may take to answer at all. An emulated or loaded guest needs seconds.
const FIND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a stock qemu-ga may take to freeze. It has no limit of its own, and a guest must not wait for ever.
const STOCK_FREEZE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one attempt to thaw may take.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);
/// How long thawing is tried again. A stock qemu-ga never thaws by itself; ours does at the end of its lease.
const THAW_PATIENCE: Duration = Duration::from_secs(60);
/// How long a channel may refuse to be connected to: behind it is no QEMU any more, and so no guest.
const GONE_PATIENCE: Duration = Duration::from_secs(3);
/// Between two attempts to thaw.
const THAW_PAUSE: Duration = Duration::from_millis(500);
/// How long a rehearsal may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// Whoever answers in the guest.
#[derive(Debug)]
pub struct Guest<L = Socket> {
    agent: Option<Agent<L>>,
    stock: StockFreeze,
    /// The run that an agent of ours holds a freeze for, as far as is known.
    held: Option<ThawArguments>,
}

impl Guest {
    /// Looks for an agent if the request needs one, and notes in the receipt who it is, or why there is none.
    pub(crate) fn find(
        entry: &VmEntry,
        request: &Request,
        monitor: &mut Monitor,
        receipt: &mut Receipt,
    ) -> Self {
        let none = Self::over(None);
        if !request.freezes() {
            if !request.no_data {
                let message = "nothing was flushed or frozen, because no more than crash was wanted";
                receipt.reasons.push(Reason::new("freeze_not_wanted", &entry.name, message));
            }
            return none;
        }
        // A monitor that cannot say lets the agent speak for itself.
        if monitor.run(&QueryStatus {}).is_ok_and(|status| !status.running) {
            let message = "the VM is paused, so nobody in the guest can answer";
            receipt.reasons.push(Reason::new("vm_paused", &entry.name, message));
            return none;
        }
        let (guest, why) = Self::connect(entry);
        receipt.reasons.extend(why);
        receipt.agent = guest.kind();
        guest
    }

    /// Connects to whoever answers; otherwise says why nobody does.
    pub fn connect(entry: &VmEntry) -> (Self, Option<Reason>) {
        let nobody = |cause: String| {
            (
                Self::over(None),
                Some(Reason::new(
                    "no_agent",
                    &entry.name,
                    format!("{cause}: nothing can be flushed or frozen"),
                )),
            )
        };
        let Some(path) = &entry.agent else {
            return nobody("no agent channel is registered for this VM".to_owned());
        };
        match Agent::connect(path, FIND_TIMEOUT) {
            Ok(agent) => (Self::over(Some(agent)), None),
            Err(error) => nobody(error.to_string()),
        }
    }

    /// Who answers, in words.
    pub fn who(entry: &VmEntry) -> String {
        let (guest, why) = Self::connect(entry);
        guest.describe(why.as_ref())
    }

    /// Who answers, in words; or why nobody does.
    pub fn describe(&self, why: Option<&Reason>) -> String {
        match self.kind() {
            receipt::Agent::None => why.map_or_else(|| "no agent".to_owned(), |why| why.message.clone()),
            receipt::Agent::QemuGa { version } => format!("qemu-ga {version} (quiesces no application)"),
            // The version is the one that hosts which know only qemu-ga compare; its own is in its reports.
            receipt::Agent::Stillpoint { version } => {
                format!("stillpoint-agent, compatible with qemu-ga {version}")
            }
        }
    }
}

impl<L: Line> Guest<L> {
    /// Whoever answers on an open line, or nobody.
    pub fn over(agent: Option<Agent<L>>) -> Self {
        Self { agent, stock: StockFreeze::default(), held: None }
    }

    /// Who answers, as a receipt has it.
    pub fn kind(&self) -> receipt::Agent {
        match &self.agent {
            None => receipt::Agent::None,
            Some(agent) => {
                let version = agent.info().version.clone();
                match agent.kind() {
                    Kind::Stillpoint => receipt::Agent::Stillpoint { version },
                    Kind::Stock => receipt::Agent::QemuGa { version },
                }
            }
        }
    }

    /// Somebody is there to be asked.
    pub fn can_freeze(&self) -> bool {
        self.agent.is_some()
    }

    /// Rehearses; nothing if no agent of ours is there.
    ///
    /// # Errors
    /// The agent's, in words.
    pub fn check(&mut self) -> Result<Option<CheckReport>, String> {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.kind() == Kind::Stillpoint) else {
            return Ok(None);
        };
        let arguments = CheckArguments { want: Want::Application, applications: vec![] };
        agent.stillpoint_check(&arguments, CHECK_TIMEOUT).map(Some).map_err(|error| error.to_string())
    }

    /// Freezes. Whatever comes of it, thaw afterwards.
    ///
    /// # Errors
    /// The agent's, in words. What the guest did is not known then.
    pub fn freeze(&mut self, request: &Request, run: &str, cancel: &Cancel) -> Result<(), String> {
        let agent = self.agent.as_mut().ok_or("no agent is there")?;
        let flag = cancel.flag();
        let words = |error: AgentError| error.to_string();
        if agent.kind() == Kind::Stillpoint {
            let want = if request.want >= Level::Application { Want::Application } else { Want::Filesystem };
            let arguments = FreezeArguments {
                budget_ms: request.budget_ms,
                want,
                applications: request.applications.clone(),
                ..FreezeArguments::new(run, request.lease_ms)
            };
            let frozen = agent.stillpoint_freeze(&arguments, &flag).map_err(words)?;
            if frozen.id != run {
                return Err("the agent froze for another run".to_owned());
            }
            self.held = Some(ThawArguments { id: run.to_owned() });
            return Ok(());
        }
        let listed = agent.fsinfo().map_err(words)?;
        self.stock.filesystems = listed
            .into_iter()
            .map(|f| StockFilesystem { mountpoint: f.mountpoint, kind: f.kind, device: f.name })
            .collect();
        let frozen = agent.fsfreeze_freeze(STOCK_FREEZE_TIMEOUT, &flag).map_err(words)?;
        self.stock.frozen = u64::try_from(frozen).unwrap_or(0);
        Ok(())
    }

    /// Sends the thaw of a freeze that holds, and waits for nothing: [`thaw`](Self::thaw), still to be called, hears the answer.
    /// For the moment in which the vCPUs stand still, so that the guest finds it when they go on. A stock agent is sent nothing: it
    /// is to be asked something else first.
    pub fn send_thaw_ahead(&mut self) {
        if let (Some(agent), Some(held)) = (&mut self.agent, self.held.take()) {
            agent.send_thaw_ahead(&held);
        }
    }

    /// Thaws, again and again until it is answered or patience ends.
    pub fn thaw(&mut self, run: &str) -> Ended {
        let Some(agent) = self.agent.as_mut() else { return Ended::default() };
        if agent.kind() == Kind::Stock {
            // Asked after the point and before the thaw: did it still hold?
            self.stock.frozen_after_point = agent.fsfreeze_is_frozen().unwrap_or(false);
        }
        let began = agent.line().now();
        loop {
            let answer = match agent.kind() {
                Kind::Stillpoint => agent
                    .stillpoint_thaw(&ThawArguments { id: run.to_owned() }, THAW_TIMEOUT)
                    .map(|report| Ended { answered: true, report: Some(report), ..Ended::default() }),
                Kind::Stock => agent.fsfreeze_thaw(THAW_TIMEOUT).map(|thawed| {
                    self.stock.thawed = u64::try_from(thawed).unwrap_or(0);
                    Ended { answered: true, stock: Some(self.stock.clone()), ..Ended::default() }
                }),
            };
            match answer {
                Ok(ended) => return ended,
                // A stock agent that says no has not thawed, and nobody else will: it is asked again.
                Err(error @ AgentError::Failed { .. }) if agent.kind() == Kind::Stock => {
                    if agent.line().now().saturating_duration_since(began) >= THAW_PATIENCE {
                        return unanswered(&error);
                    }
                    agent.line().pause(THAW_PAUSE);
                }
                // The agent is there and says no: it knows nothing of this run, so nothing of it is frozen.
                Err(error @ (AgentError::Failed { .. } | AgentError::NotOffered { .. })) => {
                    return Ended { unknown: true, ..unanswered(&error) };
                }
                // It has carried out the thaw, and reports what nobody understands: it would do so again.
                Err(error @ AgentError::Answer { .. }) => return unanswered(&error),
                Err(error) if agent.line().now().saturating_duration_since(began) >= patience(&error) => {
                    return unanswered(&error);
                }
                Err(_) => agent.line().pause(THAW_PAUSE),
            }
        }
    }
}

fn patience(error: &AgentError) -> Duration {
    match error {
        AgentError::Connect { .. } => GONE_PATIENCE,
        _ => THAW_PATIENCE,
    }
}

fn unanswered(error: &AgentError) -> Ended {
    let reason = Reason::new("thaw_failed", "guest", error.to_string());
    Ended { reasons: vec![reason], ..Ended::default() }
}
