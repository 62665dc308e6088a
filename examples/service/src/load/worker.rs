//! One client, with objects of its own.
//!
//! Invariant: for each object it knows every state that the service may show: one after an
//! acknowledgement, several after lost or refused changes. Anything else is wrong.

use std::ops::Range;
use std::time::Instant;

use axum::body::Body;
use axum::http::{Method, StatusCode};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::{Answer, Http, Load, Lost, Report, body_of};

/// A state of an object: its version, or none where there is no object.
type State = Option<u64>;

/// One client.
#[derive(Debug)]
pub struct Worker {
    /// The service.
    pub http: Http,
    /// What it saw.
    pub report: Report,
    /// Of the names: nobody else has such.
    prefix: String,
    max_len: usize,
    rng: SmallRng,
    version: u64,
    /// What each object may be.
    may: Vec<Vec<State>>,
}

impl Worker {
    /// The client of this number.
    pub fn new(http: Http, number: usize, load: &Load) -> Self {
        Worker {
            http,
            report: Report::default(),
            prefix: format!("load/{}/{number}/", load.seed),
            max_len: load.max_len,
            rng: SmallRng::seed_from_u64(load.seed ^ number as u64),
            version: load.seed << 20,
            may: vec![vec![None]; load.objects],
        }
    }

    /// Sends one request, and compares what comes.
    ///
    /// # Errors
    ///
    /// [`Lost`] if there is no whole answer.
    pub async fn step(&mut self) -> Result<(), Lost> {
        let object = self.rng.random_range(0..self.may.len());
        match self.rng.random_range(0..100) {
            0..30 => self.put(object).await,
            30..65 => self.get(object, None).await.map(drop),
            65..90 => {
                let start = self.rng.random_range(0..=self.max_len);
                let len = self.rng.random_range(1..=self.max_len);
                self.get(object, Some(start..start + len)).await.map(drop)
            }
            90..95 => self.delete(object).await,
            _ => self.list().await,
        }
    }

    /// Reads every object. From then on each is what it was seen to be.
    pub async fn check_all(&mut self) {
        for object in 0..self.may.len() {
            let name = self.name(object);
            match self.get(object, None).await {
                Ok(Some(seen)) => self.may[object] = vec![seen],
                Ok(None) => self.report.wrong.push(format!("{name} is not as it may be")),
                Err(lost) => self.report.wrong.push(format!("{name} cannot be read: {lost}")),
            }
        }
    }

    /// Deletes every object.
    pub async fn delete_all(&mut self) {
        for object in 0..self.may.len() {
            if let Err(lost) = self.delete(object).await {
                self.report.lose(&lost);
            }
        }
    }

    fn name(&self, object: usize) -> String {
        format!("{}{object}", self.prefix)
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Result<Answer, Lost> {
        let is_get = method == Method::GET && path.starts_with("/objects/");
        let began = Instant::now();
        let answer = self.http.send(method, path, headers, body).await?;
        self.report.answered(answer.status.as_u16(), began.elapsed(), is_get);
        if answer.status.is_server_error() && !is_refusal(answer.status) {
            let text = String::from_utf8_lossy(&answer.body);
            self.report.wrong.push(format!("{path}: {} {text}", answer.status));
        }
        Ok(answer)
    }

    async fn put(&mut self, object: usize) -> Result<(), Lost> {
        self.version += 1;
        let version = self.version;
        let name = self.name(object);
        let bytes = Bytes::from(body_of(&name, version, self.max_len));
        let tag = version.to_string();
        let len = bytes.len().to_string();
        let mut headers = vec![("x-object-meta-version", tag.as_str())];
        let body = if self.rng.random_bool(0.5) {
            in_chunks(bytes)
        } else {
            headers.push(("content-length", &len));
            Body::from(bytes)
        };
        // Until it is acknowledged it may be there or not.
        self.may[object].push(Some(version));
        let path = format!("/objects/{name}");
        let answer = self.send(Method::PUT, &path, &headers, body).await?;
        if answer.status.is_success() {
            self.may[object] = vec![Some(version)];
        } else if !is_refusal(answer.status) {
            self.report.wrong.push(format!("PUT {path}: {}", answer.status));
        }
        Ok(())
    }

    async fn delete(&mut self, object: usize) -> Result<(), Lost> {
        self.may[object].push(None);
        let path = format!("/objects/{}", self.name(object));
        let answer = self.send(Method::DELETE, &path, &[], Body::empty()).await?;
        if answer.status.is_success() || answer.status == StatusCode::NOT_FOUND {
            self.may[object] = vec![None];
        }
        Ok(())
    }

    /// The state that was seen, if it may be; none if it is wrong or was not shown.
    async fn get(
        &mut self,
        object: usize,
        range: Option<Range<usize>>,
    ) -> Result<Option<State>, Lost> {
        let name = self.name(object);
        let path = format!("/objects/{name}");
        let text = range.as_ref().map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let headers: Vec<_> = text.iter().map(|text| ("range", text.as_str())).collect();
        let answer = self.send(Method::GET, &path, &headers, Body::empty()).await?;
        let seen = match answer.status {
            StatusCode::NOT_FOUND => None,
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
                answer.header("x-object-meta-version").parse::<u64>().ok()
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                self.check_outside(object, range, &answer);
                return Ok(None);
            }
            _ => return Ok(None),
        };
        if !self.may[object].contains(&seen) {
            let may = &self.may[object];
            self.report.wrong.push(format!("{name} is {seen:?}, and may be {may:?}"));
            return Ok(None);
        }
        if let Some(version) = seen {
            let whole = body_of(&name, version, self.max_len);
            let is_part = answer.status == StatusCode::PARTIAL_CONTENT;
            let part = range.filter(|_| is_part).unwrap_or(0..whole.len());
            let part = part.start.min(whole.len())..part.end.min(whole.len());
            self.report.compared += 1;
            if answer.body[..] != whole[part.clone()] {
                let got = answer.body.len();
                self.report.wrong.push(format!("{name}@{version}: {got} bytes for {part:?}"));
                return Ok(None);
            }
        }
        Ok(Some(seen))
    }

    /// A range may be outside of every object that there may be, and of no other.
    fn check_outside(&mut self, object: usize, range: Option<Range<usize>>, answer: &Answer) {
        let name = self.name(object);
        let told = answer.header("content-range").strip_prefix("bytes */").unwrap_or_default();
        let lens = self.may[object].iter().flatten();
        let mut lens = lens.map(|version| body_of(&name, *version, self.max_len).len());
        let start = range.map_or(0, |range| range.start);
        if !lens.any(|len| len <= start && told == len.to_string()) {
            self.report.wrong.push(format!("{name}: 416 for {start} of {told:?}"));
        }
    }

    /// Lists the objects that it has, in pages.
    async fn list(&mut self) -> Result<(), Lost> {
        let prefix = self.prefix.clone();
        let mut after = String::new();
        let mut seen = Vec::new();
        loop {
            let path = format!("/objects?prefix={prefix}&limit=5&start_after={after}");
            let answer = self.send(Method::GET, &path, &[], Body::empty()).await?;
            if !answer.status.is_success() {
                return Ok(());
            }
            let page: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
            let objects = page["objects"].as_array().into_iter().flatten();
            seen.extend(objects.filter_map(|object| object["name"].as_str().map(str::to_owned)));
            match page["next"].as_str() {
                Some(next) => after = next.to_owned(),
                None => break,
            }
        }
        for object in 0..self.may.len() {
            let is_listed = seen.contains(&self.name(object));
            if !self.may[object].iter().any(|state| state.is_some() == is_listed) {
                let name = self.name(object);
                self.report.wrong.push(format!("{name} is listed: {is_listed}"));
            }
        }
        Ok(())
    }
}

/// Whether the service says that it has too much to do.
fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS)
}

/// A body whose length nobody says.
fn in_chunks(bytes: Bytes) -> Body {
    let pieces: Vec<_> = bytes.chunks(10_000).map(|piece| bytes.slice_ref(piece)).collect();
    Body::from_stream(futures::stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>)))
}
