//! A listing of names, page by page out of the catalog, with those in between that only memory has.
//!
//! Invariant: items come in the order of their bytes, each once, and what memory says of a name
//! goes before what the catalog says: an entry is never newer than what opening the name finds.
//! Nothing is held between two items. Called by `entries.rs`.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::Result;
use super::entries::{ListOptions, Listed, NamedEntry};
use crate::catalog::CatalogRecord;
use crate::error::VirtualMemoryError;
use crate::names::Names;

/// Names that are read from the catalog at a time.
const PAGE: usize = 256;

/// Where a listing is.
pub(super) struct Listing {
    names: Arc<Names>,
    options: ListOptions,
    prefix: Arc<str>,
    /// What comes next is here or behind.
    from: Bound<Arc<str>>,
    /// Items that are still wanted.
    left: usize,
    page: VecDeque<(Arc<str>, CatalogRecord)>,
    /// Names that the catalog does not know yet; none before the first look.
    volatile: Option<BTreeMap<Arc<str>, CatalogRecord>>,
    /// The catalog has no more behind the page.
    ended: bool,
}

impl Listing {
    pub(super) fn new(names: Arc<Names>, options: ListOptions) -> Self {
        let from = options
            .start_after
            .as_deref()
            .map_or(Bound::Unbounded, |after| Bound::Excluded(after.into()));
        Listing {
            names,
            prefix: options.prefix.as_str().into(),
            from,
            left: options.limit.unwrap_or(usize::MAX),
            options,
            page: VecDeque::new(),
            volatile: None,
            ended: false,
        }
    }

    /// The next item.
    pub(super) async fn next(&mut self) -> Result<Option<Listed>> {
        if self.options.delimiter.as_deref() == Some("") {
            let reason = "it has at least one byte";
            return Err(VirtualMemoryError::invalid_config("delimiter", reason));
        }
        while self.left > 0 {
            let Some((name, record)) = self.next_name().await? else { break };
            let Some(common) = self.common_prefix(&name) else {
                self.left -= 1;
                return Ok(Some(Listed::Entry(NamedEntry::new(name, record))));
            };
            self.skip(&common);
            // A page that ended with it, or with a name in it, has listed it.
            if self.options.start_after.as_deref().is_none_or(|after| &*common > after) {
                self.left -= 1;
                return Ok(Some(Listed::Prefix(common)));
            }
        }
        Ok(None)
    }

    /// What the names of a group have in common.
    fn common_prefix(&self, name: &str) -> Option<Arc<str>> {
        let delimiter = self.options.delimiter.as_deref()?;
        let at = name.get(self.prefix.len()..)?.find(delimiter)?;
        Some(name[..self.prefix.len() + at + delimiter.len()].into())
    }

    /// Goes on behind everything that starts with `common`.
    fn skip(&mut self, common: &str) {
        while self.page.front().is_some_and(|(name, _)| name.starts_with(common)) {
            self.page.pop_front();
        }
        let behind = successor(common);
        if let Some(volatile) = &mut self.volatile {
            *volatile = match &behind {
                Some(behind) => volatile.split_off(behind),
                None => BTreeMap::new(),
            };
        }
        if self.page.is_empty() && !self.ended {
            match behind {
                Some(behind) => self.from = Bound::Included(behind),
                None => self.ended = true,
            }
        }
    }

    /// The next name, of those that are not grouped.
    async fn next_name(&mut self) -> Result<Option<(Arc<str>, CatalogRecord)>> {
        if self.names.shared.is_closed() {
            return Err(VirtualMemoryError::Closed);
        }
        if self.volatile.is_none() {
            let mut volatile = self.names.volatile(&self.prefix);
            if let Bound::Excluded(after) = &self.from {
                volatile = volatile.split_off(after);
                volatile.remove(after);
            }
            self.volatile = Some(volatile);
        }
        if self.page.is_empty() && !self.ended {
            self.read_page().await?;
        }
        let volatile = self.volatile.get_or_insert_default();
        let first = volatile.first_key_value().map(|(name, _)| name.clone());
        let stored = self.page.front().map(|(name, _)| name.clone());
        let next = match (first, stored) {
            (Some(first), Some(stored)) if first == stored => {
                // It was flushed since the listing began.
                volatile.pop_first();
                self.page.pop_front()
            }
            (Some(first), stored) if stored.as_ref().is_none_or(|stored| first < *stored) => {
                volatile.pop_first()
            }
            _ => self.page.pop_front(),
        };
        Ok(next.map(|(name, record)| {
            let record = self.names.record_in_memory(&name).unwrap_or(record);
            (name, record)
        }))
    }

    async fn read_page(&mut self) -> Result<()> {
        let limit = match &self.options.delimiter {
            // Many of them may be one item.
            Some(_) => PAGE,
            None => PAGE.min(self.left),
        };
        let catalog = self.names.catalog()?.clone();
        let page = catalog.names(self.prefix.clone(), self.from.clone(), limit).await?;
        self.ended = page.len() < limit;
        if let Some((last, _)) = page.last() {
            self.from = Bound::Excluded(last.clone());
        }
        self.page = page.into();
        Ok(())
    }
}

/// The least string that is greater than all that start with `text`, if there is one.
fn successor(text: &str) -> Option<Arc<str>> {
    let mut chars: Vec<char> = text.chars().collect();
    while let Some(last) = chars.pop() {
        // The order of strings is that of their characters; surrogates are none.
        if let Some(next) = (last..=char::MAX).nth(1) {
            chars.push(next);
            return Some(chars.into_iter().collect::<String>().into());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successors_are_the_least_strings_behind_a_prefix() {
        let of = |text| successor(text).as_deref().map(str::to_owned);
        assert_eq!(of("a/").as_deref(), Some("a0"));
        assert_eq!(of("a\u{d7ff}").as_deref(), Some("a\u{e000}"));
        assert_eq!(of("a\u{10ffff}").as_deref(), Some("b"));
        assert_eq!(of("\u{10ffff}"), None);
        for text in ["a", "\u{7f}", "\u{7ff}", "\u{ffff}", "\u{e9}\u{10ffff}"] {
            let behind = successor(text).unwrap();
            assert!(*behind > *format!("{text}\u{10ffff}\u{10ffff}"), "{text:?}");
        }
    }
}
