//! Spans for an OpenTelemetry collector, by OTLP over HTTP.
//!
//! Invariant: no request waits for the collector. A span goes into a bounded queue or is dropped, a
//! thread of the SDK's sends what is queued, and the end takes `otlp.timeout` at most. An outage is
//! one line in the log. Called by the program; without an endpoint there is nothing of it.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use axum::body::Bytes;
use axum::http::{Request, Response};
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{self as sdk, Sampler, SdkTracerProvider, SpanData};
use tokio::runtime::Handle;
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use crate::config::Otlp;

/// What is sent, whatever the log is filtered by: nothing that another library has in its spans.
const SENT: [(&str, Level); 3] = [
    ("vmem_service", Level::INFO),
    ("vmem::read", Level::DEBUG),
    ("vmem::migration", Level::DEBUG),
];

/// The spans of this process on their way to a collector.
#[derive(Debug)]
pub struct Otel {
    provider: SdkTracerProvider,
    timeout: Duration,
}

impl Otel {
    /// Starts to send what its layers see; none if there is no endpoint. Connections are those of
    /// the runtime that runs this.
    ///
    /// # Errors
    ///
    /// If a variable `OTEL_*` cannot be used, or there is no runtime.
    pub fn start(config: &Otlp) -> anyhow::Result<Option<Otel>> {
        let Some(endpoint) = &config.endpoint else { return Ok(None) };
        let timeout = config.timeout;
        let client = Client {
            http: HyperClient::with_default_connector(timeout, None),
            runtime: Handle::try_current()?,
            is_failing: AtomicBool::new(false),
        };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(timeout)
            .build()
            .context("sending spans by OTLP")?;
        let resource = Resource::builder()
            .with_service_name(config.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let ratio = Sampler::TraceIdRatioBased(config.sample_ratio);
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(Quiet(exporter))
            .with_sampler(Sampler::ParentBased(Box::new(ratio)))
            .with_resource(resource)
            .build();
        Ok(Some(Otel { provider, timeout }))
    }

    /// The layer of the subscriber through which it sees spans.
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("vmem-service"))
            .with_location(false)
            .with_threads(false)
            .with_filter(Targets::new().with_targets(SENT))
    }

    /// Sends what is queued, for `timeout` at most. The SDK logs what then is lost.
    pub async fn end(self) {
        let Otel { provider, timeout } = self;
        let ending = move || provider.shutdown_with_timeout(timeout);
        let _ = tokio::task::spawn_blocking(ending).await;
    }
}

/// A client whose requests run on the runtime, since the thread that sends them has none.
#[derive(Debug)]
struct Client {
    http: HyperClient,
    runtime: Handle,
    is_failing: AtomicBool,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let http = self.http.clone();
        let result = self.runtime.spawn(async move { http.send_bytes(request).await }).await?;
        let failure = match &result {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(answer.status().to_string()),
            Err(error) => Some(causes(&**error)),
        };
        let was_failing = self.is_failing.swap(failure.is_some(), Ordering::Relaxed);
        match failure {
            Some(why) if !was_failing => tracing::warn!("the collector takes no spans: {why}"),
            None if was_failing => tracing::info!("the collector takes spans again"),
            _ => {}
        }
        result
    }
}

/// An error and what caused it, in one line.
fn causes(error: &(dyn Error + 'static)) -> String {
    anyhow::Chain::new(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// An exporter that reports no batch as lost: the SDK would log each, and `Client` logs an outage.
#[derive(Debug)]
struct Quiet(SpanExporter);

impl sdk::SpanExporter for Quiet {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let _ = self.0.export(batch).await;
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}
