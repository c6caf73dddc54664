//! Arguments of `guest-set-vcpus` and `guest-set-memory-blocks`.

use crate::Error;
use crate::json::Received;
use crate::members::{self, Members};

/// What a processor is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuWish {
    /// Its number in the guest.
    pub logical_id: i64,
    /// In use.
    pub online: bool,
}

/// What a block of memory is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBlockWish {
    /// Its number in the guest.
    pub phys_index: u64,
    /// In use.
    pub online: bool,
}

pub(crate) fn vcpus(members: &mut Members) -> Result<Vec<VcpuWish>, Error> {
    let wish = |mut members: Members| {
        let wish = VcpuWish {
            logical_id: members.required("logical-id", members::integer)?,
            online: members.required("online", members::boolean)?,
        };
        finish(members)?;
        Ok(wish)
    };
    members.required("vcpus", members::objects)?.into_iter().map(wish).collect()
}

pub(crate) fn memory_blocks(members: &mut Members) -> Result<Vec<MemoryBlockWish>, Error> {
    let wish = |mut members: Members| {
        let wish = MemoryBlockWish {
            phys_index: members.required("phys-index", wrapping)?,
            online: members.required("online", members::boolean)?,
        };
        finish(members)?;
        Ok(wish)
    };
    members.required("mem-blks", members::objects)?.into_iter().map(wish).collect()
}

/// Hosts send back what they were told, `can-offline` with it, which means nothing here.
fn finish(mut members: Members) -> Result<(), Error> {
    members.optional("can-offline", members::boolean)?;
    members.finish()
}

/// qemu-ga takes a negative number for a large one.
fn wrapping(value: Received, path: &str) -> Result<u64, Error> {
    match value.as_i64() {
        Some(signed) => Ok(signed.cast_unsigned()),
        // These are qemu-ga's words for a number without sign, unlike those for one with a sign.
        None => value.as_u64().ok_or_else(|| Error::generic(format!("Parameter '{path}' expects uint64"))),
    }
}
