//! The undo record: for each superblock how far its freeze and its thaw have come, in a file that the agent and
//! its guard both map.
//!
//! A record on tmpfs survives both of them, so a restarted agent reads what is still to be undone. Writing it is a
//! store to memory: no call that could wait for a frozen file system. Agent and guard agree who thaws by exchanging
//! a word, so each superblock that we froze gets exactly one FITHAW, and its answer tells whether the freeze held.
//!
//! Layout, in 64-bit words of the machine's own order: a header of 16, then 8 for each superblock, in plan order, then 2 for each
//! disk whose queue is shortened.

use super::mountinfo::DeviceNumber;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// First word of every record; its last byte is the version of the layout.
const MAGIC: u64 = 0x5350_4652_5A55_4E02;
const HEADER_WORDS: usize = 16;
const ENTRY_WORDS: usize = 8;
const QUEUE_WORDS: usize = 2;
/// Most superblocks of one freeze: each has a thread ready in the guard and one in the agent.
pub const SUPERBLOCKS_MAX: usize = 1024;
/// Most disks whose queues are shortened.
pub const QUEUES_MAX: usize = 1024;

/// Words of the header.
#[derive(Clone, Copy)]
enum Header {
    Magic,
    Count,
    Phase,
    DeadlineNs,
    AgentDueNs,
    ShortGrace,
    HooksOwed,
    HookProcess,
    HookCalledNs,
    Queues,
}

/// Words of an entry.
#[derive(Clone, Copy)]
enum Word {
    Device,
    Frozen,
    Thawed,
    FreezeCalledNs,
    FreezeDoneNs,
    ThawCalledNs,
    ThawDoneNs,
    Errno,
}

/// Words of a queue.
#[derive(Clone, Copy)]
enum QueueWord {
    Device,
    Requests,
}

/// Numbers that stand for the states of a word.
macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $value:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant = $value,)+ }
        impl $name {
            fn from_word(word: u64) -> Self {
                match word {
                    $($value => Self::$variant,)+
                    // Only these are ever written; a torn file is refused when it is opened.
                    _ => Self::UNKNOWN,
                }
            }
        }
    };
}

states! {
    /// Who ended the freeze; the first to say so wins.
    Phase {
        /// Freezing is allowed, or done.
        Armed = 0,
        /// The host asked for the thaw.
        Host = 1,
        /// The lease ended.
        LeaseEnded = 2,
        /// The agent died, or was told to stop.
        AgentGone = 3,
        /// The freeze did not come about, or took too long.
        Failed = 4,
        /// The guard died or hangs.
        GuardGone = 5,
    }
}
impl Phase {
    const UNKNOWN: Self = Self::AgentGone;
}

states! {
    /// How far the freeze of a superblock has come. Written by the agent's thread for it alone.
    Freeze {
        /// Not begun.
        Idle = 0,
        /// FIFREEZE is about to be called, or runs.
        Called = 1,
        /// Frozen by us.
        Frozen = 2,
        /// Someone else holds it.
        Busy = 3,
        /// It cannot freeze.
        Unsupported = 4,
        /// FIFREEZE failed otherwise; see `errno`.
        Failed = 5,
    }
}
impl Freeze {
    // Whatever it means, a FITHAW too many is better than one too few.
    const UNKNOWN: Self = Self::Called;
}

states! {
    /// How far the thaw of a superblock has come.
    Thaw {
        /// Not begun.
        Idle = 0,
        /// The agent took it upon itself.
        Agent = 1,
        /// The guard took it upon itself.
        Guard = 2,
        /// Our FITHAW thawed it: it was frozen all the time.
        Done = 3,
        /// Our FITHAW found it thawed: someone else came first.
        Early = 4,
    }
}
impl Thaw {
    const UNKNOWN: Self = Self::Idle;
}

/// The record, mapped.
#[derive(Debug)]
pub struct Ledger {
    words: NonNull<AtomicU64>,
    length: usize,
    count: usize,
    queues: usize,
    file: OwnedFd,
}

// SAFETY: the mapping is only ever read and written through atomics, and lives as long as the value.
unsafe impl Send for Ledger {}
// SAFETY: as above.
unsafe impl Sync for Ledger {}

impl Ledger {
    /// A new record of these superblocks, and of disks whose queues may be shortened; private to root.
    /// # Errors
    /// What the file system of the state folder answers; `AlreadyExists` if another run's record is there.
    pub fn create(path: &Path, devices: &[DeviceNumber], queues: &[DeviceNumber]) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Self::write(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?, devices, queues)
    }

    /// A record that no other process will read, of hooks alone.
    /// # Errors
    /// When the kernel has no room.
    pub fn of_hooks_alone() -> io::Result<Self> {
        Self::write(rustix::fs::memfd_create("hooks", MemfdFlags::CLOEXEC)?, &[], &[])
    }

    fn write(file: OwnedFd, devices: &[DeviceNumber], queues: &[DeviceNumber]) -> io::Result<Self> {
        let length = length(devices.len(), queues.len());
        // Really allocated: a full tmpfs must show here, and not as a bus error while frozen.
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 8 * length as u64)?;
        let mut ledger = Self::map(file, length)?;
        (ledger.count, ledger.queues) = (devices.len(), queues.len());
        for (at, device) in devices.iter().enumerate() {
            ledger.entry(at, Word::Device).store(device.packed(), SeqCst);
        }
        for (at, device) in queues.iter().enumerate() {
            ledger.queue(at, QueueWord::Device).store(device.packed(), SeqCst);
        }
        ledger.header(Header::Count).store(devices.len() as u64, SeqCst);
        ledger.header(Header::Queues).store(queues.len() as u64, SeqCst);
        ledger.header(Header::Magic).store(MAGIC, SeqCst);
        Ok(ledger)
    }

    /// The record that a dead agent left.
    /// # Errors
    /// `InvalidData` if it is none of ours or was never completed: then nothing was frozen under it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::attach(File::options().read(true).write(true).open(path)?.into())
    }

    /// The record behind an inherited descriptor.
    /// # Errors
    /// As `open`.
    pub fn attach(file: OwnedFd) -> io::Result<Self> {
        let bytes = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        let damaged =
            || io::Error::new(io::ErrorKind::InvalidData, "the undo record is damaged or unfinished");
        if !(8 * HEADER_WORDS..=8 * length(SUPERBLOCKS_MAX, QUEUES_MAX)).contains(&bytes) {
            return Err(damaged());
        }
        let mut ledger = Self::map(file, bytes / 8)?;
        let number = |header| usize::try_from(ledger.header(header).load(SeqCst)).unwrap_or(usize::MAX);
        let (count, queues) = (number(Header::Count), number(Header::Queues));
        let complete = ledger.header(Header::Magic).load(SeqCst) == MAGIC
            && count <= SUPERBLOCKS_MAX
            && queues <= QUEUES_MAX
            && length(count, queues) == ledger.length;
        (ledger.count, ledger.queues) = (count, queues);
        if complete { Ok(ledger) } else { Err(damaged()) }
    }

    /// So many words, of which nothing is known yet.
    fn map(file: OwnedFd, length: usize) -> io::Result<Self> {
        // SAFETY: a fresh shared mapping of a file that is at least that long; nothing else points to it.
        let words = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                8 * length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )?
        };
        let words = NonNull::new(words.cast()).ok_or_else(|| io::Error::other("mapped at null"))?;
        Ok(Self { words, length, count: 0, queues: 0, file })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.length, "word {at} of the undo record");
        // SAFETY: within the mapping, aligned (it starts on a page), and atomics may be shared.
        unsafe { self.words.add(at).as_ref() }
    }

    fn header(&self, header: Header) -> &AtomicU64 {
        self.word(header as usize)
    }

    fn entry(&self, at: usize, word: Word) -> &AtomicU64 {
        assert!(at < self.count, "superblock {at} of {}", self.count);
        self.word(HEADER_WORDS + ENTRY_WORDS * at + word as usize)
    }

    fn queue(&self, at: usize, word: QueueWord) -> &AtomicU64 {
        assert!(at < self.queues, "queue {at} of {}", self.queues);
        self.word(length(self.count, at) + word as usize)
    }

    /// The file, to hand it on.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// How many superblocks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Who ended the freeze, if anyone.
    pub fn phase(&self) -> Phase {
        Phase::from_word(self.header(Header::Phase).load(SeqCst))
    }

    /// Ends the freeze for a reason; answers the reason that counts, an earlier one if there is one.
    pub fn end(&self, why: Phase) -> Phase {
        let phase = self.header(Header::Phase);
        match phase.compare_exchange(Phase::Armed as u64, why as u64, SeqCst, SeqCst) {
            Ok(_) => why,
            Err(earlier) => Phase::from_word(earlier),
        }
    }

    /// The guard's end of the lease. A renewal at the same moment wins: `renew` writes the deadline and then looks at
    /// the phase, this writes the phase and then looks at the deadline, so at least one of them sees the other.
    pub fn end_of_lease(&self, now_ns: u64) -> bool {
        let due = |deadline: u64| deadline != 0 && now_ns >= deadline;
        if !due(self.deadline_ns()) || self.end(Phase::LeaseEnded) != Phase::LeaseEnded {
            return false;
        }
        if due(self.deadline_ns()) {
            return true;
        }
        // Renewed in between; nobody else changes a phase that is no longer `Armed`.
        self.header(Header::Phase).store(Phase::Armed as u64, SeqCst);
        false
    }

    /// When the lease ends, in nanoseconds since boot; 0: it has not begun.
    pub fn deadline_ns(&self) -> u64 {
        self.header(Header::DeadlineNs).load(SeqCst)
    }

    /// By when the agent will have come to its next step, in nanoseconds since boot; 0: the lease alone counts.
    pub fn agent_due_ns(&self) -> u64 {
        self.header(Header::AgentDueNs).load(SeqCst)
    }

    /// Says by when the agent will be heard of again. One that is not hangs, and its guard ends it.
    pub fn expect_agent(&self, due_ns: u64) {
        self.header(Header::AgentDueNs).store(due_ns, SeqCst);
    }

    /// Sets the end of the lease; answers whether the freeze still holds.
    pub fn renew(&self, deadline_ns: u64) -> bool {
        self.header(Header::DeadlineNs).store(deadline_ns, SeqCst);
        self.phase() == Phase::Armed
    }

    /// Says that the machine's grace periods are about to be made short, or are as before.
    pub fn note_short_grace(&self, short: bool) {
        self.header(Header::ShortGrace).store(u64::from(short), SeqCst);
    }

    /// Whether grace periods may have been left short.
    pub fn has_short_grace(&self) -> bool {
        self.header(Header::ShortGrace).load(SeqCst) != 0
    }

    /// The disks whose queues may be shortened, each with what its queue held before; 0: as it was.
    pub fn queues(&self) -> impl Iterator<Item = (DeviceNumber, u64)> {
        let word = |at, word| self.queue(at, word).load(SeqCst);
        (0..self.queues).map(move |at| (unpacked(word(at, QueueWord::Device)), word(at, QueueWord::Requests)))
    }

    /// Says that a queue, in the order of `queues`, held so many requests and is about to be shortened; 0: it is as it was.
    pub fn note_queue(&self, at: usize, requests: u64) {
        self.queue(at, QueueWord::Requests).store(requests, SeqCst);
    }

    /// Says that the first so many hooks of the record are owed the call after the thaw.
    pub fn owe_hooks(&self, count: usize) {
        self.header(Header::HooksOwed).store(count as u64, SeqCst);
    }

    /// How many hooks, from the first, are owed the call after the thaw.
    pub fn hooks_owed(&self) -> usize {
        usize::try_from(self.header(Header::HooksOwed).load(SeqCst)).unwrap_or(usize::MAX)
    }

    /// Says when a hook is about to be called, in nanoseconds since boot.
    pub fn note_hook_call(&self, now_ns: u64) {
        self.header(Header::HookCalledNs).store(now_ns, SeqCst);
    }

    /// When a hook was last called, in nanoseconds since boot; 0: never.
    pub fn hook_called_ns(&self) -> u64 {
        self.header(Header::HookCalledNs).load(SeqCst)
    }

    /// Says which process is the hook that runs; 0: none. Async-signal-safe.
    pub fn note_hook_process(&self, process: u64) {
        self.header(Header::HookProcess).store(process, SeqCst);
    }

    /// The hook that runs, which leads a session; 0: none.
    pub fn hook_process(&self) -> u64 {
        self.header(Header::HookProcess).load(SeqCst)
    }

    /// Number of the superblock.
    pub fn device(&self, at: usize) -> DeviceNumber {
        unpacked(self.entry(at, Word::Device).load(SeqCst))
    }

    /// How far its freeze has come.
    pub fn frozen(&self, at: usize) -> Freeze {
        Freeze::from_word(self.entry(at, Word::Frozen).load(SeqCst))
    }

    /// How far its thaw has come.
    pub fn thawed(&self, at: usize) -> Thaw {
        Thaw::from_word(self.entry(at, Word::Thawed).load(SeqCst))
    }

    /// Says that FIFREEZE comes next; answers false if the freeze has ended meanwhile, and then it must not come.
    pub fn begin_freeze(&self, at: usize, now_ns: u64) -> bool {
        self.entry(at, Word::FreezeCalledNs).store(now_ns, SeqCst);
        self.entry(at, Word::Frozen).store(Freeze::Called as u64, SeqCst);
        // Written first, looked at second; a thaw does it the other way round. One of the two sees the other.
        if self.phase() == Phase::Armed {
            return true;
        }
        self.entry(at, Word::Frozen).store(Freeze::Idle as u64, SeqCst);
        false
    }

    /// Says what FIFREEZE answered.
    pub fn end_freeze(&self, at: usize, outcome: Freeze, errno: i32, now_ns: u64) {
        self.entry(at, Word::FreezeDoneNs).store(now_ns, SeqCst);
        self.entry(at, Word::Errno).store(u64::from(errno.unsigned_abs()), SeqCst);
        self.entry(at, Word::Frozen).store(outcome as u64, SeqCst);
    }

    /// Takes the thaw of a superblock upon oneself; false if the other did already.
    pub fn claim(&self, at: usize, who: Thaw, now_ns: u64) -> bool {
        let won = self
            .entry(at, Word::Thawed)
            .compare_exchange(Thaw::Idle as u64, who as u64, SeqCst, SeqCst)
            .is_ok();
        if won {
            self.entry(at, Word::ThawCalledNs).store(now_ns, SeqCst);
        }
        won
    }

    /// Says what FITHAW answered. The first answer stays: a second FITHAW finds everything thawed.
    pub fn end_thaw(&self, at: usize, outcome: Thaw, now_ns: u64) {
        let thawed = self.entry(at, Word::Thawed);
        let set = thawed.fetch_update(SeqCst, SeqCst, |word| {
            let settled = matches!(Thaw::from_word(word), Thaw::Done | Thaw::Early);
            (!settled).then_some(outcome as u64)
        });
        if set.is_ok() {
            self.entry(at, Word::ThawDoneNs).store(now_ns, SeqCst);
        }
    }

    /// Whether nothing is left to undo for a superblock.
    pub fn settled(&self, at: usize) -> bool {
        match self.frozen(at) {
            Freeze::Called | Freeze::Frozen => matches!(self.thawed(at), Thaw::Done | Thaw::Early),
            Freeze::Idle | Freeze::Busy | Freeze::Unsupported | Freeze::Failed => true,
        }
    }

    /// How many superblocks we froze.
    pub fn frozen_count(&self) -> u64 {
        (0..self.count).filter(|at| self.frozen(*at) == Freeze::Frozen).count() as u64
    }

    /// When FIFREEZE was called and returned, FITHAW was called and returned; nanoseconds since boot, 0: not yet.
    pub fn times_ns(&self, at: usize) -> [u64; 4] {
        [Word::FreezeCalledNs, Word::FreezeDoneNs, Word::ThawCalledNs, Word::ThawDoneNs]
            .map(|word| self.entry(at, word).load(SeqCst))
    }

    /// What FIFREEZE failed with.
    pub fn errno(&self, at: usize) -> i32 {
        i32::try_from(self.entry(at, Word::Errno).load(SeqCst)).unwrap_or(0)
    }
}

/// Words of a record.
fn length(count: usize, queues: usize) -> usize {
    HEADER_WORDS + ENTRY_WORDS * count + QUEUE_WORDS * queues
}

fn unpacked(packed: u64) -> DeviceNumber {
    let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
    DeviceNumber { major: half(packed >> 32), minor: half(packed) }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` made; no reference into it outlives `self`. A failure leaves a mapping behind.
        let _unmapped = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), 8 * self.length) }.is_ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let folder = tempfile::tempdir().unwrap();
        let devices = [DeviceNumber { major: 8, minor: 1 }, DeviceNumber { major: 0, minor: 40 }];
        let queues = [DeviceNumber { major: 254, minor: 16 }];
        let ledger = Ledger::create(&folder.path().join("undo"), &devices, &queues).unwrap();
        (folder, ledger)
    }

    #[test]
    fn a_record_is_read_back_by_another_process() {
        let (folder, ledger) = ledger();
        assert!(ledger.begin_freeze(1, 5));
        ledger.end_freeze(1, Freeze::Frozen, 0, 9);
        let other = Ledger::open(&folder.path().join("undo")).unwrap();
        assert_eq!((other.count(), other.device(1).to_string()), (2, "0:40".to_owned()));
        ledger.note_queue(0, 256);
        assert_eq!(other.queues().collect::<Vec<_>>(), [(DeviceNumber { major: 254, minor: 16 }, 256)]);
        assert_eq!(other.frozen(1), Freeze::Frozen);
        assert!(!other.settled(1) && other.settled(0));
        other.end_thaw(1, Thaw::Done, 12);
        assert!(ledger.settled(1));
        assert_eq!(ledger.times_ns(1), [5, 9, 0, 12]);
    }

    #[test]
    fn one_of_two_thaws_wins_and_its_answer_stays() {
        let (_folder, ledger) = ledger();
        assert!(ledger.claim(0, Thaw::Guard, 1));
        assert!(!ledger.claim(0, Thaw::Agent, 2));
        ledger.end_thaw(0, Thaw::Done, 3);
        ledger.end_thaw(0, Thaw::Early, 4);
        assert_eq!(ledger.thawed(0), Thaw::Done);
    }

    #[test]
    fn nothing_freezes_after_the_end() {
        let (_folder, ledger) = ledger();
        assert_eq!(ledger.end(Phase::Host), Phase::Host);
        assert_eq!(ledger.end(Phase::LeaseEnded), Phase::Host);
        assert!(!ledger.begin_freeze(0, 1));
        assert_eq!(ledger.frozen(0), Freeze::Idle);
    }

    #[test]
    fn a_lease_ends_once_and_cannot_be_renewed_afterwards() {
        let (_folder, ledger) = ledger();
        assert!(!ledger.end_of_lease(1_000), "no lease yet");
        assert!(ledger.renew(500));
        assert!(!ledger.end_of_lease(499));
        assert!(ledger.renew(800));
        assert!(!ledger.end_of_lease(500));
        assert!(ledger.end_of_lease(800));
        assert!(!ledger.renew(2_000));
    }

    #[test]
    fn an_unfinished_record_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("undo");
        std::fs::write(&path, vec![0u8; 8 * length(1, 0)]).unwrap();
        assert_eq!(Ledger::open(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(Ledger::open(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
