//! Steps and a bar on a terminal; nothing where nobody watches.

use engine::watch::Watch;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Shows an operation on standard error if that is a terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    pub(crate) fn new(quiet: bool) -> Self {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(steps());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar }
    }
}

impl Watch for Bar {
    fn step(&self, name: &str) {
        self.bar.set_style(steps());
        self.bar.set_message(name.to_owned());
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        if self.bar.length() != Some(total_bytes) {
            self.bar.set_length(total_bytes);
            self.bar.reset_eta();
        }
        self.bar.set_style(bytes());
        self.bar.set_position(done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn steps() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template")
}

fn bytes() -> ProgressStyle {
    ProgressStyle::with_template(
        "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left",
    )
    .expect("a fixed template")
}
