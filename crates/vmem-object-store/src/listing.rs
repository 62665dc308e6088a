//! Listings.
//!
//! Invariant: prefixes are whole segments of a path, but in pages, where they are strings; names
//! that are no paths are passed over. Called by `store.rs`, and by users for pages.

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::list::{PaginatedListOptions, PaginatedListResult, PaginatedListStore};
use object_store::path::{DELIMITER, Path};
use object_store::{ListResult, ObjectMeta, Result};
use vmem_core::{ListOptions, Listed};

use crate::error;
use crate::store::{Store, meta};

/// The size of a page if the caller does not say.
const PAGE: usize = 1000;

impl Store {
    /// Everything below a directory that comes behind `offset`.
    pub(crate) fn list_behind(
        &self,
        prefix: Option<&Path>,
        offset: Option<&Path>,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let names = self.names().clone();
        let mut options = ListOptions::new().prefix(names.directory(prefix));
        if let Some(offset) = offset {
            options = options.start_after(names.key(offset.as_ref()));
        }
        let place = prefix.cloned().unwrap_or_default();
        let listed = self.vmem().names_with(options);
        let paths = listed.filter_map(move |listed| {
            let found = match listed {
                Ok(Listed::Entry(entry)) => {
                    names.path(&entry.name).map(|path| Ok(meta(path, &entry)))
                }
                Ok(Listed::Prefix(_)) => None,
                Err(error) => Some(Err(error::of(error, &place))),
            };
            std::future::ready(found)
        });
        paths.boxed()
    }

    /// What is directly in a directory.
    pub(crate) async fn list_directory(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let options =
            ListOptions::new().prefix(self.names().directory(prefix)).delimiter(DELIMITER);
        let listed: Result<Vec<_>, _> = self.vmem().names_with(options).try_collect().await;
        let place = prefix.cloned().unwrap_or_default();
        Ok(self.sort(listed.map_err(|error| error::of(error, &place))?, DELIMITER))
    }

    fn sort(&self, listed: Vec<Listed>, delimiter: &str) -> ListResult {
        let mut objects = Vec::new();
        let mut common_prefixes = Vec::new();
        for item in listed {
            match item {
                Listed::Entry(entry) => {
                    let path = self.names().path(&entry.name);
                    objects.extend(path.map(|path| meta(path, &entry)));
                }
                Listed::Prefix(prefix) => {
                    common_prefixes.extend(self.names().common_prefix(&prefix, delimiter));
                }
            }
        }
        ListResult { common_prefixes, objects }
    }
}

#[async_trait]
impl PaginatedListStore for Store {
    async fn list_paginated(
        &self,
        prefix: Option<&str>,
        opts: PaginatedListOptions,
    ) -> Result<PaginatedListResult> {
        let limit = opts.max_keys.unwrap_or(PAGE);
        let mut options = ListOptions::new()
            .prefix(self.names().key(prefix.unwrap_or_default()))
            // One more says whether there is another page.
            .limit(limit.saturating_add(1));
        let after = opts.offset.map(|offset| self.names().key(&offset)).max(opts.page_token);
        if let Some(after) = after {
            options = options.start_after(after);
        }
        let delimiter = opts.delimiter.unwrap_or_default();
        if !delimiter.is_empty() {
            options = options.delimiter(&*delimiter);
        }
        let listed: Result<Vec<_>, _> = self.vmem().names_with(options).try_collect().await;
        let mut listed = listed.map_err(|error| error::of(error, &Path::ROOT))?;
        let is_truncated = listed.len() > limit;
        listed.truncate(limit);
        let last = listed.last().filter(|_| is_truncated);
        let page_token = last.map(|last| last.key().to_owned());
        Ok(PaginatedListResult { result: self.sort(listed, &delimiter), page_token })
    }
}
