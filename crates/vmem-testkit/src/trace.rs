//! What a thread's traces say: the spans and events that a store leaves.
//!
//! Invariant: a test sees what its own thread traces, and nothing of other tests; a store on a
//! current-thread runtime runs there whole. Called by tests of traces.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// The fields of a span or of an event, as text.
#[derive(Clone, Debug, Default)]
pub struct Fields(pub BTreeMap<&'static str, String>);

impl Fields {
    /// The text of a field; empty if there is none.
    pub fn text(&self, field: &str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }

    /// The number in a field.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn number(&self, field: &str) -> u128 {
        let text = self.text(field);
        text.parse().unwrap_or_else(|_| panic!("{field} is no number: {text:?}"))
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

/// A span, with all that was recorded of it.
#[derive(Clone, Debug)]
pub struct SeenSpan {
    /// Its number, which another span may have after it.
    pub id: u64,
    /// Its name.
    pub name: &'static str,
    /// Its target.
    pub target: &'static str,
    /// How much it matters.
    pub level: Level,
    /// The parent that the span names, or else the span in which it begins.
    pub parent: Option<u64>,
    /// The spans that it follows from.
    pub follows: Vec<u64>,
    /// Its fields.
    pub fields: Fields,
}

/// An event.
#[derive(Clone, Debug)]
pub struct SeenEvent {
    /// Its target.
    pub target: &'static str,
    /// How much it matters.
    pub level: Level,
    /// Its fields; its text is `message`.
    pub fields: Fields,
}

/// Everything that was traced while it watched.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    spans: Arc<Mutex<Vec<SeenSpan>>>,
    events: Arc<Mutex<Vec<SeenEvent>>>,
}

impl Seen {
    /// Watches this thread until the guard is dropped.
    pub fn watch() -> (Seen, DefaultGuard) {
        let seen = Seen::default();
        let subscriber = tracing_subscriber::registry().with(seen.clone());
        (seen, tracing::subscriber::set_default(subscriber))
    }

    /// The spans of this name.
    pub fn spans(&self, name: &str) -> Vec<SeenSpan> {
        self.spans.lock().iter().filter(|span| span.name == name).cloned().collect()
    }

    /// The events of this target.
    pub fn events(&self, target: &str) -> Vec<SeenEvent> {
        self.events.lock().iter().filter(|event| event.target == target).cloned().collect()
    }

    fn with(&self, id: &Id, change: impl FnOnce(&mut SeenSpan)) {
        let mut spans = self.spans.lock();
        // Numbers of spans that were closed are used again.
        if let Some(span) = spans.iter_mut().rev().find(|span| span.id == id.into_u64()) {
            change(span);
        }
    }
}

impl<S: Subscriber> Layer<S> for Seen {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let metadata = attributes.metadata();
        let current = context.current_span();
        let current = current.id().filter(|_| attributes.is_contextual());
        self.spans.lock().push(SeenSpan {
            id: id.into_u64(),
            name: metadata.name(),
            target: metadata.target(),
            level: *metadata.level(),
            parent: attributes.parent().or(current).map(Id::into_u64),
            follows: Vec::new(),
            fields,
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        self.with(id, |span| values.record(&mut span.fields));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, _: Context<'_, S>) {
        self.with(id, |span| span.follows.push(follows.into_u64()));
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let target = metadata.target();
        self.events.lock().push(SeenEvent { target, level: *metadata.level(), fields });
    }
}
