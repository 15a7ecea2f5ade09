//! Text from policies: the one place where it is cut and escaped. What leaves here can be shown anywhere.

/// `text` within `limit` bytes, with everything that moves a cursor, hides or turns text written out.
pub fn clean(text: &str, limit: usize) -> String {
    let mut clean = String::with_capacity(text.len().min(limit));
    for letter in text.chars() {
        let escaped = if is_plain(letter) { None } else { Some(letter.escape_unicode().to_string()) };
        let length = escaped.as_ref().map_or(letter.len_utf8(), String::len);
        if clean.len() + length > limit {
            break;
        }
        match escaped {
            Some(escaped) => clean.push_str(&escaped),
            None => clean.push(letter),
        }
    }
    clean
}

/// Neither a control character nor one of those that format text without being seen (Unicode's category Cf, and its
/// separators of lines and paragraphs).
fn is_plain(letter: char) -> bool {
    !letter.is_control()
        && !matches!(letter,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}')
}

/// Whether `text` is a code: kebab-case, at most 64 bytes.
pub(super) fn is_code(text: &str) -> bool {
    text.len() <= 64
        && text.split('-').all(|word| {
            !word.is_empty() && word.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_mislead_is_written_out() {
        assert_eq!(clean("a\u{1b}[31m\r\nred\u{202e}", 256), "a\\u{1b}[31m\\u{d}\\u{a}red\\u{202e}");
        assert_eq!(clean("nginx is refused — ask Päivi", 256), "nginx is refused — ask Päivi");
    }

    #[test]
    fn cut_between_letters() {
        assert_eq!(clean("ää", 3), "ä");
        assert_eq!(clean("ab\n", 5), "ab", "an escape is there whole or not at all");
    }

    #[test]
    fn codes_are_kebab_case() {
        for code in ["denied", "not-allowed", "cve-2026-1"] {
            assert!(is_code(code), "{code}");
        }
        for other in ["", "Denied", "a--b", "-a", "a_b", "a b", &"a".repeat(65)] {
            assert!(!is_code(other), "{other}");
        }
    }
}
