//! Promotes to a device what gathers for it read from elsewhere again and again.
//!
//! Invariant: no call waits for such a promotion, and it makes nothing leave the device that was
//! used since the object was first counted. It is counted among those under way until its task has
//! ended, or was refused. Asked for at the end of a gather.

use std::sync::Arc;

use super::{Job, promote_to_device};
use crate::events::MigrationCause;
use crate::object::Object;
use crate::requests::{Line, Request};
use crate::tier::Class;

/// An object that is being promoted, until this is dropped.
struct Asked {
    object: Arc<Object>,
    device: usize,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.object.shared.devices()[self.device].gathers.end(self.object.id);
    }
}

/// Requests that an object comes to this device, in the background, unless that is under way or
/// many others are. If there is no space for it, it stays where it is.
pub(crate) fn request_gathered(object: &Arc<Object>, device: usize) {
    let shared = &object.shared;
    let gathers = &shared.devices()[device].gathers;
    let pieces = shared.staging.pieces();
    let Some(since) = gathers.ask(object.id, object.len as u64, pieces) else { return };
    let asked = Asked { object: object.clone(), device };
    let mut job = Job::new(object.clone(), MigrationCause::Gather, shared.deadline());
    job.class = Class::Prefetch;
    if !crate::planted!("gather-greedy") {
        job.spares_since = Some(since);
    }
    let work = async move {
        // All of it, until the end.
        let asked = asked;
        if let Err(error) = promote_to_device(&job, asked.device).await {
            let handle = job.object.id;
            tracing::debug!(
                target: "vmem::migration", handle, %error, "a gathered object stays where it is"
            );
        }
    };
    shared.request(Request::new("vmem-promote", Line::Background, work));
}
