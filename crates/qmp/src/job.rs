//! Background jobs: creating an image is one.

use crate::command::{Nothing, commands};
use serde::{Deserialize, Serialize};

/// Asks for every job.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryJobs {}
/// Asks for the block jobs (backups, mirrors, commits …).
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryBlockJobs {}
/// Forgets a concluded job.
#[derive(Clone, Debug, Serialize)]
pub struct JobDismiss {
    /// Its id.
    pub id: String,
}
/// Cancels a job.
#[derive(Clone, Debug, Serialize)]
pub struct JobCancel {
    /// Its id.
    pub id: String,
}

/// One job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id.
    #[serde(default)]
    pub id: String,
    /// `create`, `backup`, `mirror` …
    #[serde(rename = "type", default)]
    pub kind: String,
    /// `running`, `pending`, `concluded` …
    #[serde(default)]
    pub status: String,
    /// Why it failed, if it did.
    #[serde(default)]
    pub error: Option<String>,
}

/// One block job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct BlockJob {
    /// Its id.
    #[serde(default)]
    pub device: String,
    /// `backup`, `mirror` …
    #[serde(rename = "type", default)]
    pub kind: String,
}

commands! {
    QueryJobs => "query-jobs" -> Vec<Job>;
    QueryBlockJobs => "query-block-jobs" -> Vec<BlockJob>;
    JobDismiss => "job-dismiss" -> Nothing;
    JobCancel => "job-cancel" -> Nothing;
}
