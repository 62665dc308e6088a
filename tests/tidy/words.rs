//! The words that this project does not use, and what it says instead.
//!
//! The glossary of `CONTRIBUTING.md` says which word is meant by which concept; these are the
//! others. A phrase is of whole words, `a|b` is either, `!a|b` neither, `~` up to three words
//! between. A word that the glossary does not want for a concept is refused here, or stands in
//! `ELSEWHERE`, since it has another meaning too.

/// In comments, documents, messages: the phrase, and what to say instead.
pub(crate) const PHRASES: &[(&str, &str)] = &[
    ("he|him|his|himself", "code and callers are \"it\" and \"the caller\""),
    ("whoever|whom", "name the actor: the caller, the waiter, the task, the reader"),
    ("!user|users|people who", "name the actor; people are \"users who\""),
    ("so many", "name the number: \"`n` bytes\", \"this many\", \"the most objects\""),
    ("not to be had", "unavailable"),
    (
        "is|are|was|were|be|been|being told",
        "the noun learns, is woken, is notified, or gets an error",
    ),
    ("the matter of", "is up to, concerns"),
    ("what is there", "name it"),
    ("by and by", "over time"),
    ("come|comes|came to its|an end", "ends"),
    ("lives|live to see", "say what happens"),
    ("bring|brings|brought|bringing ~ up", "promote, load"),
    ("bring|brings|brought|bringing ~ down", "demote, write back"),
    ("come|comes|came|coming up", "is promoted, is loaded"),
    ("come|comes|came|coming down", "is demoted, is copied to the host"),
    ("go|goes|went|gone|going up", "is promoted, grows"),
    ("go|goes|went|gone|going down", "is demoted, is written back, shrinks"),
    ("write|writes|wrote|written|writing ~ down", "write back"),
    ("raise|raises|raised|raising a|an|it|the|them|object|objects", "promote, increase"),
    ("lower|lowers|lowered|lowering a|an|it|the|them|object|objects", "demote, reduce"),
    ("device|gpu tier|tiers", "the tier is VRAM, the device is the GPU"),
    ("vram of the device|gpu|card", "device memory"),
    ("push|pushes|pushed|pushing out", "evict"),
    ("foreground", "demand"),
    ("low priority", "background"),
    ("ram|ssd tier|tiers", "the host tier, the disk tier"),
    ("spot|spots", "place"),
    ("size on tier", "footprint"),
    ("quota|quotas|allowance|allowances", "budget"),
];

/// Anywhere, as a part of a name too.
pub(crate) const WORDS: &[(&str, &str)] = &[
    ("room|rooms|roomy", "space"),
    ("ahead", "prefetch; read-ahead is `early`, \"before it is needed\""),
    ("patience", "deadline, or the longest wait"),
];

/// Words of the glossary's last column that no scanner can refuse, with what else they mean.
pub(crate) const ELSEWHERE: &[(&str, &str)] = &[
    ("drop", "what Rust does with a value, and a caller with a future"),
    ("card", "the hardware, in documents and in the programs that check it"),
    ("block", "of a file system, of code; and to wait without yielding"),
    ("region", "of the address space, in what the system calls say"),
    ("page", "of memory, and of documentation"),
    ("part", "of an object or a copy that is no chunk"),
    ("lock", "a mutex, or the file that keeps others from the directory"),
    ("lock of the object", "the mutex of its state, under the gate"),
    ("borrow", "what Rust calls a reference"),
    ("rest", "what is left"),
];
