//! The commands: one row each, in the order of qemu-ga's schema, ours last.

use crate::arguments::{Suspend, accounts, exec};
use crate::members::{self, Members};
use crate::stillpoint::{CheckArguments, FreezeArguments, RenewArguments, ThawArguments};
use crate::{Error, arguments};

/// A command with its arguments, understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// `guest-sync-delimited` and `guest-sync`: answer this number.
    Sync(i64),
    /// `guest-ping`.
    Ping,
    /// `guest-get-time`.
    GetTime,
    /// `guest-set-time`, to so many nanoseconds since 1970, or to the hardware's clock.
    SetTime(Option<i64>),
    /// `guest-info`.
    Info,
    /// `guest-shutdown`.
    Shutdown(arguments::Shutdown),
    /// `guest-file-open`.
    FileOpen(arguments::FileOpen),
    /// `guest-file-close`, `-read`, `-write`, `-seek` and `-flush`.
    File(arguments::FileCall),
    /// `guest-fsfreeze-status`.
    FsfreezeStatus,
    /// `guest-fsfreeze-freeze`, and `-freeze-list` with its mount points.
    FsfreezeFreeze(Option<Vec<String>>),
    /// `guest-fsfreeze-thaw`.
    FsfreezeThaw,
    /// `guest-fstrim`, of free stretches from so many bytes on.
    Fstrim(i64),
    /// `guest-suspend-disk`, `-ram` and `-hybrid`.
    Suspend(arguments::Suspend),
    /// `guest-network-get-interfaces`.
    NetworkGetInterfaces,
    /// `guest-get-vcpus`.
    GetVcpus,
    /// `guest-set-vcpus`.
    SetVcpus(Vec<arguments::VcpuWish>),
    /// `guest-get-disks`.
    GetDisks,
    /// `guest-get-fsinfo`.
    GetFsinfo,
    /// `guest-set-user-password`.
    SetUserPassword(accounts::SetUserPassword),
    /// `guest-get-memory-blocks`.
    GetMemoryBlocks,
    /// `guest-set-memory-blocks`.
    SetMemoryBlocks(Vec<arguments::MemoryBlockWish>),
    /// `guest-get-memory-block-info`.
    GetMemoryBlockInfo,
    /// `guest-exec-status`.
    ExecStatus(exec::ExecStatus),
    /// `guest-exec`.
    Exec(Box<exec::Exec>),
    /// `guest-get-host-name`.
    GetHostName,
    /// `guest-get-users`.
    GetUsers,
    /// `guest-get-timezone`.
    GetTimezone,
    /// `guest-get-osinfo`.
    GetOsinfo,
    /// `guest-ssh-get-authorized-keys`, of this user.
    SshGetAuthorizedKeys(String),
    /// `guest-ssh-add-authorized-keys`.
    SshAddAuthorizedKeys(accounts::AuthorizedKeys),
    /// `guest-ssh-remove-authorized-keys`.
    SshRemoveAuthorizedKeys(accounts::AuthorizedKeys),
    /// `guest-get-diskstats`.
    GetDiskstats,
    /// `guest-get-cpustats`.
    GetCpustats,
    /// `guest-get-load`.
    GetLoad,
    /// `guest-network-get-route`.
    NetworkGetRoute,
    /// `stillpoint-check`.
    StillpointCheck(CheckArguments),
    /// `stillpoint-freeze`.
    StillpointFreeze(FreezeArguments),
    /// `stillpoint-renew`.
    StillpointRenew(RenewArguments),
    /// `stillpoint-thaw`.
    StillpointThaw(ThawArguments),
    /// `stillpoint-status`.
    StillpointStatus,
}

/// What a command means for the order of answers on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Waits for its turn.
    Plain,
    /// Drops what is still owed and is answered at once.
    Sync {
        /// Its answer follows a byte 0xFF.
        delimited: bool,
    },
    /// Is carried out even where its answer is no longer wanted.
    Thaw,
}

/// One row of the table.
#[derive(Debug)]
pub struct Command {
    /// Name on the wire.
    pub name: &'static str,
    /// Whether success is answered.
    pub answers_success: bool,
    /// Whether it may be called while frozen.
    pub while_frozen: bool,
    /// How it stands to others on its connection.
    pub order: Order,
    read: fn(&mut Members) -> Result<Call, Error>,
}

impl Command {
    const fn new(name: &'static str, read: fn(&mut Members) -> Result<Call, Error>) -> Self {
        Self { name, answers_success: true, while_frozen: false, order: Order::Plain, read }
    }

    const fn while_frozen(mut self) -> Self {
        self.while_frozen = true;
        self
    }

    const fn silent(mut self) -> Self {
        self.answers_success = false;
        self
    }

    const fn order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// The row of this name.
    pub fn find(name: &str) -> Option<&'static Command> {
        COMMANDS.iter().find(|command| command.name == name)
    }

    /// Understands the arguments.
    /// # Errors
    /// As qemu-ga words them: missing, of the wrong type, or unexpected.
    pub fn read(&self, mut members: Members) -> Result<Call, Error> {
        let call = (self.read)(&mut members)?;
        members.finish()?;
        Ok(call)
    }
}

/// Every command. guest-info lists them from the last to the first, as qemu-ga does.
pub static COMMANDS: &[Command] = &[
    Command::new("guest-sync-delimited", sync).while_frozen().order(Order::Sync { delimited: true }),
    Command::new("guest-sync", sync).while_frozen().order(Order::Sync { delimited: false }),
    Command::new("guest-ping", |_| Ok(Call::Ping)).while_frozen(),
    Command::new("guest-get-time", |_| Ok(Call::GetTime)),
    Command::new("guest-set-time", |members| members.optional("time", members::integer).map(Call::SetTime)),
    Command::new("guest-info", |_| Ok(Call::Info)).while_frozen(),
    Command::new("guest-shutdown", |members| arguments::Shutdown::read(members).map(Call::Shutdown)).silent(),
    Command::new("guest-file-open", |members| arguments::FileOpen::read(members).map(Call::FileOpen)),
    Command::new("guest-file-close", |members| arguments::FileCall::close(members).map(Call::File)),
    Command::new("guest-file-read", |members| arguments::FileCall::read(members).map(Call::File)),
    Command::new("guest-file-write", |members| arguments::FileCall::write(members).map(Call::File)),
    Command::new("guest-file-seek", |members| arguments::FileCall::seek(members).map(Call::File)),
    Command::new("guest-file-flush", |members| arguments::FileCall::flush(members).map(Call::File)),
    Command::new("guest-fsfreeze-status", |_| Ok(Call::FsfreezeStatus)).while_frozen(),
    Command::new("guest-fsfreeze-freeze", |_| Ok(Call::FsfreezeFreeze(None))),
    Command::new("guest-fsfreeze-freeze-list", |members| {
        members.optional("mountpoints", members::strings).map(Call::FsfreezeFreeze)
    }),
    Command::new("guest-fsfreeze-thaw", |_| Ok(Call::FsfreezeThaw)).while_frozen().order(Order::Thaw),
    Command::new("guest-fstrim", |members| {
        Ok(Call::Fstrim(members.optional("minimum", members::integer)?.unwrap_or(0)))
    }),
    Command::new("guest-suspend-disk", |_| Ok(Call::Suspend(Suspend::Disk))).silent(),
    Command::new("guest-suspend-ram", |_| Ok(Call::Suspend(Suspend::Ram))).silent(),
    Command::new("guest-suspend-hybrid", |_| Ok(Call::Suspend(Suspend::Hybrid))).silent(),
    Command::new("guest-network-get-interfaces", |_| Ok(Call::NetworkGetInterfaces)),
    Command::new("guest-get-vcpus", |_| Ok(Call::GetVcpus)),
    Command::new("guest-set-vcpus", |members| arguments::hotplug::vcpus(members).map(Call::SetVcpus)),
    Command::new("guest-get-disks", |_| Ok(Call::GetDisks)),
    Command::new("guest-get-fsinfo", |_| Ok(Call::GetFsinfo)),
    Command::new("guest-set-user-password", |members| {
        accounts::SetUserPassword::read(members).map(Call::SetUserPassword)
    }),
    Command::new("guest-get-memory-blocks", |_| Ok(Call::GetMemoryBlocks)),
    Command::new("guest-set-memory-blocks", |members| {
        arguments::hotplug::memory_blocks(members).map(Call::SetMemoryBlocks)
    }),
    Command::new("guest-get-memory-block-info", |_| Ok(Call::GetMemoryBlockInfo)),
    Command::new("guest-exec-status", |members| exec::ExecStatus::read(members).map(Call::ExecStatus)),
    Command::new("guest-exec", |members| exec::Exec::read(members).map(|exec| Call::Exec(Box::new(exec)))),
    Command::new("guest-get-host-name", |_| Ok(Call::GetHostName)),
    Command::new("guest-get-users", |_| Ok(Call::GetUsers)),
    Command::new("guest-get-timezone", |_| Ok(Call::GetTimezone)),
    Command::new("guest-get-osinfo", |_| Ok(Call::GetOsinfo)),
    Command::new("guest-ssh-get-authorized-keys", |members| {
        members.required("username", members::string).map(Call::SshGetAuthorizedKeys)
    }),
    Command::new("guest-ssh-add-authorized-keys", |members| {
        accounts::AuthorizedKeys::read_add(members).map(Call::SshAddAuthorizedKeys)
    }),
    Command::new("guest-ssh-remove-authorized-keys", |members| {
        accounts::AuthorizedKeys::read_remove(members).map(Call::SshRemoveAuthorizedKeys)
    }),
    Command::new("guest-get-diskstats", |_| Ok(Call::GetDiskstats)),
    Command::new("guest-get-cpustats", |_| Ok(Call::GetCpustats)),
    Command::new("guest-get-load", |_| Ok(Call::GetLoad)),
    Command::new("guest-network-get-route", |_| Ok(Call::NetworkGetRoute)),
    Command::new("stillpoint-check", |members| arguments::check(members).map(Call::StillpointCheck)),
    Command::new("stillpoint-freeze", |members| arguments::freeze(members).map(Call::StillpointFreeze)),
    Command::new("stillpoint-renew", |members| arguments::renew(members).map(Call::StillpointRenew))
        .while_frozen(),
    Command::new("stillpoint-thaw", |members| arguments::thaw(members).map(Call::StillpointThaw))
        .while_frozen()
        .order(Order::Thaw),
    Command::new("stillpoint-status", |_| Ok(Call::StillpointStatus)).while_frozen(),
];

fn sync(members: &mut Members) -> Result<Call, Error> {
    members.required("id", members::integer).map(Call::Sync)
}

#[cfg(test)]
mod tests {
    use super::{COMMANDS, Call, Command};
    use crate::members::Members;
    use serde_json::{Value, json};

    fn read(name: &str, arguments: Value) -> Result<Call, String> {
        let Value::Object(members) = arguments else { panic!("arguments are an object") };
        Command::find(name).expect("a known command").read(Members::new(members)).map_err(|error| error.desc)
    }

    #[track_caller]
    fn refuses(name: &str, arguments: Value, words: &str) {
        assert_eq!(read(name, arguments).expect_err("bad arguments"), words);
    }

    #[test]
    fn bad_arguments_are_refused_in_the_words_of_qemu_ga() {
        refuses("guest-sync", json!({}), "Parameter 'id' is missing");
        refuses("guest-sync", json!({"id": "1"}), "Invalid parameter type for 'id', expected: integer");
        refuses("guest-sync", json!({"id": 1.0}), "Invalid parameter type for 'id', expected: integer");
        refuses("guest-sync", json!({"id": u64::MAX}), "Invalid parameter type for 'id', expected: integer");
        refuses("guest-sync", json!({"id": 1, "x": 2}), "Parameter 'x' is unexpected");
        refuses("guest-ping", json!({"x": null}), "Parameter 'x' is unexpected");
        refuses(
            "guest-exec",
            json!({"path": "a", "arg": "b"}),
            "Invalid parameter type for 'arg', expected: array",
        );
        refuses(
            "guest-exec",
            json!({"path": "a", "arg": [1]}),
            "Invalid parameter type for 'arg[0]', expected: string",
        );
        let words = "Invalid parameter type for 'capture-output', expected: GuestExecCaptureOutput";
        refuses("guest-exec", json!({"path": "a", "capture-output": 1}), words);
        let words = "Parameter 'capture-output' does not accept value 'foo'";
        refuses("guest-exec", json!({"path": "a", "capture-output": "foo"}), words);
    }

    #[test]
    fn arguments_about_files_processors_and_memory_are_refused_in_the_words_of_qemu_ga() {
        refuses("guest-file-open", json!({"path": 1}), "Invalid parameter type for 'path', expected: string");
        refuses("guest-file-write", json!({"handle": 1}), "Parameter 'buf-b64' is missing");
        let whence = |whence: Value| json!({"handle": 1, "offset": 0, "whence": whence});
        refuses("guest-file-seek", whence(json!("x")), "Parameter 'whence' does not accept value 'x'");
        let words = "Invalid parameter type for 'whence', expected: integer";
        refuses("guest-file-seek", whence(json!(1.5)), words);
        let words = "Invalid parameter type for 'whence', expected: GuestFileWhence";
        refuses("guest-file-seek", whence(json!(null)), words);
        refuses(
            "guest-fstrim",
            json!({"minimum": "1"}),
            "Invalid parameter type for 'minimum', expected: integer",
        );
        let vcpu = |vcpu: Value| json!({"vcpus": [vcpu]});
        refuses("guest-set-vcpus", json!({}), "Parameter 'vcpus' is missing");
        refuses(
            "guest-set-vcpus",
            vcpu(json!({"online": true})),
            "Parameter 'vcpus[0].logical-id' is missing",
        );
        let words = "Parameter 'vcpus[0].x' is unexpected";
        refuses("guest-set-vcpus", vcpu(json!({"logical-id": 0, "online": true, "x": 1})), words);
        let block = |block: Value| json!({"mem-blks": [block]});
        let words = "Parameter 'mem-blks[0].phys-index' expects uint64";
        refuses("guest-set-memory-blocks", block(json!({"phys-index": 1.5, "online": true})), words);
        let words = "Invalid parameter type for 'mem-blks[0].online', expected: boolean";
        refuses("guest-set-memory-blocks", block(json!({"phys-index": -1, "online": 1})), words);
        let Ok(Call::SetMemoryBlocks(wishes)) = read(
            "guest-set-memory-blocks",
            block(json!({"phys-index": -1, "online": true, "can-offline": false})),
        ) else {
            panic!("refused")
        };
        assert_eq!(wishes[0].phys_index, u64::MAX);
    }

    #[test]
    fn our_own_arguments_have_defaults_and_limits() {
        let Ok(Call::StillpointFreeze(freeze)) =
            read("stillpoint-freeze", json!({"id": "a", "lease_ms": 5000}))
        else {
            panic!("refused")
        };
        assert_eq!(
            (freeze.prepare_ms_max, freeze.quiesce_ms_max, freeze.budget_ms),
            (120_000, 10_000, 5_000)
        );
        refuses("stillpoint-freeze", json!({"id": "a"}), "Parameter 'lease_ms' is missing");
        refuses("stillpoint-thaw", json!({"id": ""}), "Parameter 'id' does not accept value ''");
        refuses(
            "stillpoint-check",
            json!({"want": "clean"}),
            "Parameter 'want' does not accept value 'clean'",
        );
        let policies = json!({"applications": [{"kind": "postgresql", "policy": "maybe"}]});
        refuses(
            "stillpoint-check",
            policies,
            "Parameter 'applications[0].policy' does not accept value 'maybe'",
        );
        let policies = json!({"applications": [{"kind": "postgresql", "policy": "off", "x": 1}]});
        refuses("stillpoint-check", policies, "Parameter 'applications[0].x' is unexpected");
    }

    #[test]
    fn only_these_may_be_called_while_frozen() {
        let names: Vec<_> =
            COMMANDS.iter().filter(|command| command.while_frozen).map(|command| command.name).collect();
        assert_eq!(
            names.join(" "),
            "guest-sync-delimited guest-sync guest-ping guest-info guest-fsfreeze-status guest-fsfreeze-thaw \
             stillpoint-renew stillpoint-thaw stillpoint-status"
        );
    }

    #[test]
    fn names_are_unique() {
        for (index, command) in COMMANDS.iter().enumerate() {
            assert!(COMMANDS[index + 1..].iter().all(|other| other.name != command.name), "{}", command.name);
        }
    }
}
