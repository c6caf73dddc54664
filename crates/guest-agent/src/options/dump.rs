//! `-D`: all settings as a key file that says the same.

use super::keyfile::escape;
use super::settings::{OURS, Options};
use std::path::Path;

/// Prints settings in qemu-ga's order; a group of ours follows only where it says something.
pub fn dump(options: &Options) -> String {
    let path = |path: &Path| escape(&path.to_string_lossy());
    let mut lines = vec!["[general]".to_owned()];
    let mut line = |key: &str, value: &str| lines.push(format!("{key}={value}"));
    line("daemon", &options.daemon.to_string());
    line("method", options.method.name());
    if let Some(place) = options.path.clone().or(options.method.default_path()) {
        line("path", &path(&place));
    }
    if let Some(logfile) = &options.logfile {
        line("logfile", &path(logfile));
    }
    line("pidfile", &path(&options.pidfile));
    if let Some(hook) = &options.hook {
        line("fsfreeze-hook", &path(hook));
    }
    line("statedir", &path(&options.statedir));
    line("verbose", &options.verbose.to_string());
    line("retry-path", &options.retry_path.to_string());
    line("block-rpcs", &escape(&options.blocked.join(",")));
    line("allow-rpcs", &escape(&options.allowed.join(",")));
    let default = Options::default();
    let mut ours = Vec::new();
    let mut line = |key: &str, value: &str| ours.push(format!("{key}={}", escape(value)));
    if options.reported_version != default.reported_version {
        line("report-version", &options.reported_version);
    }
    if options.compat_lease != default.compat_lease {
        line("compat-lease-ms", &options.compat_lease.as_millis().to_string());
    }
    if options.hook_limit != default.hook_limit {
        line("hook-limit-ms", &options.hook_limit.as_millis().to_string());
    }
    if options.report_hook_output {
        line("report-hook-output", "true");
    }
    let (include, exclude) = options.selection.lists();
    for (key, list) in [("freeze-include", include), ("freeze-exclude", exclude)] {
        if !list.is_empty() {
            line(key, &list);
        }
    }
    if !ours.is_empty() {
        lines.push(String::new());
        lines.push(format!("[{OURS}]"));
        lines.append(&mut ours);
    }
    lines.join("\n") + "\n"
}
