//! QEMU's object tree: reading and setting properties of devices.

use crate::command::{Nothing, commands};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Lists the properties of an object.
#[derive(Clone, Debug, Serialize)]
pub struct QomList {
    /// Absolute path, or a partial one that is unique.
    pub path: String,
}

/// Lists the properties that a type of device can be given.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceListProperties {
    /// Name of the type.
    pub typename: String,
}

/// Reads a property.
#[derive(Clone, Debug, Serialize)]
pub struct QomGet {
    /// As in [`QomList`].
    pub path: String,
    /// Name of the property.
    pub property: String,
}

/// Sets a property.
#[derive(Clone, Debug, Serialize)]
pub struct QomSet {
    /// As in [`QomList`].
    pub path: String,
    /// Name of the property.
    pub property: String,
    /// Its new value.
    pub value: Value,
}

/// One property of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Property {
    /// Its name.
    pub name: String,
    /// Its type: `str`, `child<…>`, `link<…>` …
    #[serde(rename = "type", default)]
    pub kind: String,
}

commands! {
    QomList => "qom-list" -> Vec<Property>;
    DeviceListProperties => "device-list-properties" -> Vec<Property>;
    QomGet => "qom-get" -> Value;
    QomSet => "qom-set" -> Nothing;
}
