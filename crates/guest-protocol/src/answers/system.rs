//! The answers about the guest as a whole: its name, its time zone, who is logged in, who may log in.

use serde::{Deserialize, Serialize};

/// Answer of `guest-get-host-name`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostName {
    /// As gethostname(2) has it.
    pub host_name: String,
}

/// Answer of `guest-get-timezone`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timezone {
    /// Abbreviation that holds now, e.g. `CEST`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Seconds to be added to UTC.
    pub offset: i64,
}

/// One user in `guest-get-users`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct User {
    /// Name.
    pub user: String,
    /// Seconds since 1970, of the earliest login that lasts.
    pub login_time: f64,
}

/// Answer of `guest-ssh-get-authorized-keys`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorizedKeys {
    /// The keys, the last of the file first, as qemu-ga gives them.
    pub keys: Vec<String>,
}
