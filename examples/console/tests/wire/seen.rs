//! What was sent to a console, put together.
//!
//! Invariant: values of attributes are kept after they change, so that what was true for a moment
//! is seen. Called by the test.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use console_api::Attribute;
use console_api::field::Name;
use console_api::instrument::Update;

#[derive(Debug, Default)]
pub(crate) struct Task {
    pub(crate) fields: BTreeMap<String, String>,
    pub(crate) has_ended: bool,
}

/// A read that is not a hit.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub(crate) object: String,
    /// The task that polled it last.
    pub(crate) task: Option<u64>,
    pub(crate) stages: BTreeSet<String>,
    pub(crate) has_ended: bool,
    resource: u64,
}

/// Resources and tasks of the store, by their spans.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    tasks: HashMap<u64, Task>,
    resources: HashMap<u64, String>,
    attributes: HashMap<u64, BTreeMap<String, BTreeSet<String>>>,
    reads: HashMap<u64, Read>,
    lost: u64,
}

impl Seen {
    pub(crate) fn tasks(&self) -> impl Iterator<Item = &Task> {
        self.tasks.values()
    }

    /// The span of the task of this name.
    pub(crate) fn task_named(&self, name: &str) -> Option<u64> {
        let is_it = |task: &Task| task.fields.get("task.name").is_some_and(|is| is == name);
        self.tasks.iter().find(|(_, task)| is_it(task)).map(|(span, _)| *span)
    }

    /// Every value that an attribute had, of the resource of the kind `vmem` and this type.
    pub(crate) fn values(&self, resource: &str, attribute: &str) -> Vec<&str> {
        let spans = self.resources.iter().filter(|(_, name)| *name == resource);
        let values = spans.filter_map(|(span, _)| self.attributes.get(span)?.get(attribute));
        values.flatten().map(String::as_str).collect()
    }

    pub(crate) fn reads(&self) -> impl Iterator<Item = &Read> {
        let is_ours =
            |read: &&Read| self.resources.get(&read.resource).is_some_and(|name| name == "reads");
        self.reads.values().filter(is_ours)
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    pub(crate) fn add(&mut self, update: Update) {
        self.add_tasks(update.task_update.unwrap_or_default());
        self.add_resources(update.resource_update.unwrap_or_default());
        self.add_reads(update.async_op_update.unwrap_or_default());
    }

    fn add_tasks(&mut self, update: console_api::tasks::TaskUpdate) {
        self.lost += update.dropped_events;
        for task in update.new_tasks {
            let fields = task.fields.into_iter().filter_map(named).collect();
            let span = task.id.expect("a task has a span").id;
            self.tasks.insert(span, Task { fields, has_ended: false });
        }
        for (span, stats) in update.stats_update {
            // As the console does: what comes without its task is of no use.
            if let Some(task) = self.tasks.get_mut(&span) {
                task.has_ended = stats.dropped_at.is_some();
            }
        }
    }

    fn add_resources(&mut self, update: console_api::resources::ResourceUpdate) {
        use console_api::resources::resource::kind::Kind;

        self.lost += update.dropped_events;
        for resource in update.new_resources {
            let kind = resource.kind.and_then(|kind| kind.kind);
            if kind == Some(Kind::Other("vmem".to_owned())) {
                let span = resource.id.expect("a resource has a span").id;
                self.resources.insert(span, resource.concrete_type);
            }
        }
        for (span, stats) in update.stats_update {
            if !self.resources.contains_key(&span) {
                continue;
            }
            let attributes = self.attributes.entry(span).or_default();
            for (name, value) in values(stats.attributes) {
                attributes.entry(name).or_default().insert(value);
            }
        }
    }

    fn add_reads(&mut self, update: console_api::async_ops::AsyncOpUpdate) {
        self.lost += update.dropped_events;
        for op in update.new_async_ops {
            let resource = op.resource_id.map_or(0, |span| span.id);
            let read = Read { object: op.source, resource, ..Read::default() };
            self.reads.insert(op.id.expect("an operation has a span").id, read);
        }
        for (span, stats) in update.stats_update {
            let Some(read) = self.reads.get_mut(&span) else { continue };
            read.task = stats.task_id.map(|span| span.id).or(read.task);
            read.has_ended = stats.dropped_at.is_some();
            let stages = values(stats.attributes).filter(|(name, _)| name == "waits_for");
            read.stages.extend(stages.map(|(_, stage)| stage));
        }
    }
}

fn values(attributes: Vec<Attribute>) -> impl Iterator<Item = (String, String)> {
    attributes.into_iter().filter_map(|attribute| named(attribute.field?))
}

fn named(field: console_api::Field) -> Option<(String, String)> {
    let Some(Name::StrName(name)) = field.name else { return None };
    Some((name, field.value?.to_string()))
}
