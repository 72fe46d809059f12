//! [`Filters`]: which keys `--include` and `--exclude` leave, in the manner of rsync. Pure.

use blockstore::object::marker::is_about_the_bucket;
use glob::{MatchOptions, Pattern};

use crate::failure::{Failure, Outcome};

/// `*` and `?` stop at slashes; `**` does not.
const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// One `--include` or `--exclude`.
#[derive(Clone, Debug)]
struct Rule {
    include: bool,
    /// Ends with `/`: for directories only.
    directory_only: bool,
    patterns: Vec<Pattern>,
}

/// Rules in the order in which they were typed. Of each directory above a key and of the key itself, from the top down, the
/// first rule that matches decides; what no rule matches stays. Below an excluded directory nothing is looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filters {
    rules: Vec<Rule>,
}

impl Filters {
    /// Rules of (include, pattern). A pattern that begins with `/` is matched from the top; another at the end of the path, at
    /// any depth. `*`, `?`, `[a-z]` match within a name, `**` any number of names; a `/` at the end means directories only,
    /// `/***` a directory and all below it.
    ///
    /// Errors: usage, for a pattern that makes no sense.
    pub(crate) fn parse(rules: &[(bool, String)]) -> Outcome<Self> {
        let mut parsed = Vec::new();
        for (include, text) in rules {
            let (include, text) = (*include, text.as_str());
            match text.strip_suffix("/***") {
                Some(directory) => {
                    parsed.push(Rule::parse(include, &format!("{directory}/"))?);
                    parsed.push(Rule::parse(include, &format!("{directory}/**"))?);
                }
                None => parsed.push(Rule::parse(include, text)?),
            }
        }
        Ok(Self { rules: parsed })
    }

    /// Whether a key (or a directory, ending with `/`) stays.
    pub(crate) fn keeps(&self, key: &str) -> bool {
        let inner = key.trim_end_matches('/');
        // It says which bucket this is, and is another one in every region's: only who asks for it gets it.
        if inner.rsplit('/').next().is_some_and(is_about_the_bucket)
            && !self
                .rules
                .iter()
                .any(|rule| rule.include && rule.matches(inner, false))
        {
            return false;
        }
        let levels = inner.match_indices('/').map(|(at, _)| (&key[..at], true));
        let last = (inner, key.ends_with('/'));
        levels
            .chain([last])
            .all(|(path, directory)| self.keeps_level(path, directory))
    }

    fn keeps_level(&self, path: &str, directory: bool) -> bool {
        self.rules
            .iter()
            .find(|rule| rule.matches(path, directory))
            .is_none_or(|rule| rule.include)
    }
}

impl Rule {
    fn parse(include: bool, text: &str) -> Outcome<Self> {
        let flag = if include { "include" } else { "exclude" };
        let wrong = |why: &str| Failure::usage(format!("--{flag} `{text}` is no pattern: {why}"));
        let body = text.strip_suffix('/').unwrap_or(text);
        let (anchored, body) = match body.strip_prefix('/') {
            Some(rest) => (true, rest),
            None => (false, body),
        };
        if body.is_empty() {
            return Err(wrong("it is empty"));
        }
        let mut texts = vec![body.to_owned()];
        if !anchored {
            texts.push(format!("**/{body}"));
        }
        let patterns = texts
            .iter()
            .map(|text| Pattern::new(text).map_err(|error| wrong(error.msg)))
            .collect::<Outcome<_>>()?;
        Ok(Self {
            include,
            directory_only: text.ends_with('/'),
            patterns,
        })
    }

    fn matches(&self, path: &str, directory: bool) -> bool {
        (directory || !self.directory_only)
            && self
                .patterns
                .iter()
                .any(|pattern| pattern.matches_with(path, OPTIONS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(rules: &[&str]) -> Filters {
        let rules: Vec<_> = rules
            .iter()
            .map(|rule| (rule.starts_with('+'), rule[1..].to_owned()))
            .collect();
        Filters::parse(&rules).unwrap()
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let kept = filters(&["+*.rs", "-*"]);
        assert!(kept.keeps("main.rs"));
        assert!(!kept.keeps("main.c"));
        // The directory is excluded before anybody looks into it.
        assert!(!kept.keeps("src/main.rs"));
        let kept = filters(&["+*/", "+*.rs", "-*"]);
        assert!(kept.keeps("src/deep/main.rs"));
        assert!(!kept.keeps("src/deep/main.c"));
        assert!(filters(&[]).keeps("anything"));
    }

    #[test]
    fn patterns_match_at_the_end_of_a_path_unless_they_begin_with_a_slash() {
        let kept = filters(&["-b/c"]);
        assert!(!kept.keeps("b/c") && !kept.keeps("a/b/c") && !kept.keeps("a/b/c/d"));
        assert!(kept.keeps("a/xb/c") && kept.keeps("b/cd"));
        let kept = filters(&["-/b"]);
        assert!(!kept.keeps("b") && !kept.keeps("b/x") && kept.keeps("a/b"));
    }

    #[test]
    fn the_marker_of_a_bucket_stays_where_it_is_unless_it_is_named() {
        assert!(!filters(&[]).keeps(".heliofs-volume"));
        assert!(!filters(&["+*.rs"]).keeps("vol/.heliofs-volume"));
        assert!(filters(&["+.heliofs-volume"]).keeps("vol/.heliofs-volume"));
        assert!(filters(&[]).keeps("vol/.heliofs-volume.txt"));
    }

    #[test]
    fn a_slash_at_the_end_means_directories() {
        let kept = filters(&["-tmp/"]);
        assert!(kept.keeps("tmp") && kept.keeps("a/tmp"));
        assert!(!kept.keeps("tmp/x") && !kept.keeps("a/tmp/x/y") && !kept.keeps("tmp/"));
    }

    #[test]
    fn stars_stop_at_slashes_and_two_do_not() {
        let kept = filters(&["-/a/*/c"]);
        assert!(!kept.keeps("a/b/c") && kept.keeps("a/b/b/c"));
        let kept = filters(&["-/a/**/c"]);
        assert!(!kept.keeps("a/b/c") && !kept.keeps("a/b/b/c") && !kept.keeps("a/c"));
        let kept = filters(&["-h?llo.[ch]"]);
        assert!(!kept.keeps("x/hello.c") && kept.keeps("x/hello.o"));
        let kept = filters(&["+/keep/***", "-*"]);
        assert!(kept.keeps("keep/a") && kept.keeps("keep/a/b") && !kept.keeps("other"));
        assert!(!kept.keeps("a/keep/a"));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "/", "a**b", "[a"] {
            assert!(
                Filters::parse(&[(false, text.to_owned())]).is_err(),
                "{text}"
            );
        }
    }
}
