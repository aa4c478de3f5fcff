"""People, towns and amounts: two closed lists that never meet, and an open space of names made of syllables.

`KNOWN_*` may stand in the pretraining text and in the training rows. `HELDOUT_*` stand in the held-out rows only; the
syllable names are drawn again whenever a word of theirs falls on one of these lists.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


KNOWN_FIRST = _listed("""
Aarav Abhay Aditi Ajay Akash Alka Amar Amina Anand Anil Anita Anjali Arjun Arun Asha Ashok Bala Bharat Bhavna Chandra
Charu Daya Deepa Deepak Devika Dinesh Divya Esha Farida Gauri Geeta Girish Gopal Govind Harini Harish Hema Imran Indira
Isha Jagdish Jaya Jyoti Kabir Kala Kamal Kamala Karan Kavita Kiran Kishore Lakshmi Lalita Lata Leela Madhav Madhuri
Mahesh Mala Manoj Maya Meena Mohan Mukesh Nalini Nandini Naresh Neha Nikhil Nisha Om Padma Pankaj Parvati Pooja Prakash
Priya Radha Rahul Raj Rajesh Ram Rani Ravi Rekha Rina Rohan Rohit Rupa Sachin Salma Sandeep Sanjay Sarita Seema Shanti
Shila Sita Sunil Sunita Suresh Tara Uma Usha Varun Vidya Vijay Vikram Vimala Yash Zara
""")

KNOWN_LAST = _listed("""
Agarwal Ali Banerjee Basu Bhat Bose Chopra Das Desai Deshmukh Dubey Dutta Gandhi Ghosh Gill Goel Gupta Hegde Iyer Jain
Joshi Kapoor Kaur Khan Kulkarni Kumar Mehta Menon Mishra Mukherjee Nair Naidu Pandey Patel Patil Pillai Prasad Rao Reddy
Roy Saxena Sen Shah Sharma Shetty Sinha Singh Thakur Trivedi Varma Verma Yadav
""")

KNOWN_TOWN = _listed("""
Agra Ajmer Akola Aligarh Ambala Amravati Asansol Bareilly Belgaum Bhilai Bhopal Bikaner Bokaro Chennai
Coimbatore Cuttack
Delhi Dhanbad Durgapur Erode Gaya Guntur Gurgaon Gwalior Hubli Indore Jabalpur Jaipur Jammu Jhansi Jodhpur Kanpur Kochi
Kolhapur Kolkata Kota Latur Lucknow Ludhiana Madurai Mathura Meerut Mumbai Mysore Nagpur Nashik Nellore Patna
Pune Raipur
Rajkot Ranchi Rohtak Salem Sangli Satara Siliguri Solapur Surat Thane Thrissur Udaipur Ujjain Vadodara Varanasi Vellore
""")

HELDOUT_FIRST = _listed("""
Aishwarya Amitabh Anupama Avinash Balwinder Bhagyashree Bhupendra Chitra Damini Debjani Devendra Dhananjay Dhruv Ganesh
Gayatri Gulshan Gurpreet Hanuman Harpreet Hemant Ishaan Jasleen Jitendra Kalyani Kartik Kausalya Ketan Kunal Lavanya
Madhumita Malini Manish Meenakshi Milind Mridula Mrinal Murali Namrata Narendra Navin Niranjan Omkar Pallavi Parth
Pradeep Pranav Preeti Raghunath Rajeshwari Rakesh Ramesh Revathi Ritika Rukmini Samir Saraswati Satish Shabana Shalini
Sharad Shobha Shreya Shubham Siddharth Smita Snehal Srinivas Subhash Sudha Sumitra Sushma Swapnil Swati Tanvi Tejas
Trupti Tulsi Umesh Urmila Vaishali Vasant Venkatesh Vinod Vishal Yamini Yogesh
""")

HELDOUT_LAST = _listed("""
Acharya Ahluwalia Bhattacharya Bhosale Chakraborty Chatterjee Chaudhary Chavan Deshpande Dhillon Fernandes Gaikwad
Gokhale Grewal Jadhav Kadam Kamath Khanna Khurana Krishnan Malhotra Mathur Mohanty Narayanan Ojha Oberoi Pawar
Purohit Rastogi Rathore Sahoo Salunkhe Sawant Seshadri Shinde Shukla Solanki Subramanian Swamy Tandon Tiwari Upadhyay
Vaidya Venkataraman Wagle Walia Zaveri
""")

HELDOUT_TOWN = _listed("""
Ahmednagar Alappuzha Alwar Amritsar Anantapur Aurangabad Balasore Bathinda Bhavnagar Bhubaneswar Bijapur Chandrapur
Chittoor Darbhanga Davangere Dehradun Dewas Dharwad Dibrugarh Faridabad Firozabad Gandhinagar Gangtok Gorakhpur Guwahati
Haridwar Hisar Imphal Jalandhar Jalgaon Jamnagar Jamshedpur Kakinada Kannur Karnal Kottayam Kozhikode Kurnool Mangalore
Moradabad Muzaffarpur Nanded Nizamabad Palakkad Panaji Panipat Patiala Puducherry Purnia Ratlam Rourkela Sagar
Saharanpur Sambalpur Shillong Shimla Sikar Silchar Srinagar Thanjavur Tirunelveli Tirupati Tumkur Vijayawada Warangal
""")

HELDOUT_WORDS = frozenset(word.lower() for word in HELDOUT_FIRST + HELDOUT_LAST + HELDOUT_TOWN)

_ONSETS = _listed(
    "b ch d g h j k l m n p r s t v y z b d g h j k l m n p r s t v m n r s k l p t"
    " bh dh gh jh kh ph sh th w sh bh kh br dr gr kr pr tr shr sr st sw chh mr ny ky vy dv kh nd"
)
_VOWELS = _listed("a a a a a a e e i i i o o u u aa ee oo ai au")
_CODAS = _listed("n m r l sh t k n m r l n t d j th nd nt rn rt st nk mb tt kk ll s y v")
_TOWN_ENDS = _listed("pur nagar gaon wadi garh abad palli patti kot ganj giri halli guda puram kuppam tal bad pet khed")


@dataclass(frozen=True)
class Person:
    """A customer as the bank would write them down."""

    name: str
    town: str


def _syllables(rng: random.Random, count: int) -> str:
    parts = []
    for position in range(count):
        onset = "" if position == 0 and rng.random() < 0.15 else rng.choice(_ONSETS)
        coda = rng.choice(_CODAS) if rng.random() < 0.3 else ""
        parts.append(onset + rng.choice(_VOWELS) + coda)
    return "".join(parts)


def _roughened(rng: random.Random, word: str) -> str:
    """One or two letters doubled, put in or exchanged, so that spellings outside the syllables are met as well."""
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(word))
        letter = word[at] if rng.random() < 0.4 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        word = word[:at] + letter + word[at + rng.randint(0, 1) :]
    return word


def made_word(rng: random.Random, low: int = 1, high: int = 4, ending: str = "") -> str:
    """A capitalised word of `low` to `high` syllables that is on no held-out list."""
    while True:
        word = _syllables(rng, rng.randint(low, high)) + ending
        if rng.random() < 0.3:
            word = _roughened(rng, word)
        if len(word) > 2 and word not in HELDOUT_WORDS:
            return word.capitalize()


def _longest(rng: random.Random) -> int:
    return rng.choice((2, 2, 3, 3, 5))


def made_name(rng: random.Random) -> str:
    """A personal name; its words are known names or made up, one to three of them, at times with an initial."""
    first = rng.choice(KNOWN_FIRST) if rng.random() < 0.25 else made_word(rng, 1, _longest(rng))
    last = rng.choice(KNOWN_LAST) if rng.random() < 0.25 else made_word(rng, 1, _longest(rng))
    shape = rng.random()
    if shape < 0.12:
        return first
    if shape < 0.18:
        return f"{first} {rng.choice('ABCDGHJKLMNPRSTV')} {last}"
    return f"{first} {last}"


def made_town(rng: random.Random) -> str:
    """A town: known, made up, or made up with an Indian ending."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(KNOWN_TOWN)
    if kind < 0.6:
        return made_word(rng, 1, _longest(rng) - 1, rng.choice(_TOWN_ENDS))
    return made_word(rng, 1, _longest(rng))


def made_person(rng: random.Random) -> Person:
    """A customer out of the open space."""
    return Person(made_name(rng), made_town(rng))


def known_person(rng: random.Random) -> Person:
    """A customer out of the closed lists that training may use."""
    return Person(f"{rng.choice(KNOWN_FIRST)} {rng.choice(KNOWN_LAST)}", rng.choice(KNOWN_TOWN))


def heldout_person(rng: random.Random) -> Person:
    """A customer whose every word is kept from pretraining and training."""
    return Person(f"{rng.choice(HELDOUT_FIRST)} {rng.choice(HELDOUT_LAST)}", rng.choice(HELDOUT_TOWN))


def made_amount(rng: random.Random) -> int:
    """Rupees, three to five digits, every digit drawn, so that no amount can be guessed."""
    digits = rng.choice((3, 4, 4, 5))
    return rng.randint(10 ** (digits - 1), 10**digits - 1)
